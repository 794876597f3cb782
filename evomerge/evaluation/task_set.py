"""`TaskSet`: the tasks and groups of a search, loaded once before the engine starts, so that problems with them are reported first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.core import EvaluationError, Split, loading_errors
from evomerge.evaluation.grouped_task import GroupedTask
from evomerge.evaluation.items import Items
from evomerge.evaluation.loaded_task import LoadedTask, load_task
from evomerge.evaluation.sandbox import SandboxedTask
from evomerge.evaluation.task_settings import runs_code
from evomerge.evaluation.task_spec import TaskSpec


class TaskSet:
    """Tasks whose requests and token ids are ready.

    Args:
        specs: which tasks and groups, in the order of their scores.
        tokenizer: folder of the models' tokenizer.
        trust_code: allow tasks that run code, each in its own sandbox.
        code_timeout_s: time limit for scoring one split's answers in a sandbox.
        code_processes: number of processes of a sandbox that score.

    Attributes:
        tokenizer: the transformers tokenizer.

    Raises:
        EvaluationError: the tokenizer or a task cannot be loaded, or two tasks have the same name.
    """

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        tokenizer: Path,
        *,
        trust_code: bool = False,
        code_timeout_s: float = 300.0,
        code_processes: int = 1,
    ) -> None:
        self.tokenizer = _load_tokenizer(tokenizer)
        self._sandboxes: list[SandboxedTask] = []
        self._tasks: dict[str, LoadedTask | SandboxedTask | GroupedTask] = {}

        def load(spec: TaskSpec) -> LoadedTask | SandboxedTask:
            if not trust_code or not runs_code(spec.task):
                return load_task(spec, self.tokenizer)
            self._sandboxes.append(SandboxedTask(spec, tokenizer, timeout_s=code_timeout_s, processes=code_processes))
            return self._sandboxes[-1]

        try:
            for spec in specs:
                task = (
                    GroupedTask(spec.name or spec.task, [*map(load, spec.members)], weight_by_size=spec.weight_by_size)
                    if spec.members
                    else load(spec)
                )
                if task.name in self._tasks:
                    raise EvaluationError(f"two tasks are called {task.name!r}; give each its own name")
                self._tasks[task.name] = task
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores, in the order of the tasks."""
        return tuple(self._tasks)

    def items(self, split: Split) -> Mapping[str, Items]:
        """Task name -> its items of `split`, in the order of an evaluation's `item_scores`.

        Raises:
            EvaluationError: a task has none.
        """
        return {name: task.items(split) for name, task in self._tasks.items()}

    def check_lengths(self, max_length: int) -> None:
        """Check that an engine with room for `max_length` tokens can serve every item without truncation.

        Raises:
            EvaluationError: an item is too long; names the longest item of its task.
        """
        for task in self._tasks.values():
            for items in task.splits.values():
                items.check_lengths(max_length)

    def close(self) -> None:
        """Close the sandboxes."""
        for sandbox in self._sandboxes:
            sandbox.close()


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except loading_errors() as error:
        raise EvaluationError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
