"""The items of a configuration's tasks, loaded without an engine: for the workers, and for `evomerge validate --items`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.build.engines import POSITIONS
from evomerge.build.problem import Problem
from evomerge.build.tasks import needed_splits, task_specs
from evomerge.config import LmEvalConfig, SearchConfig
from evomerge.core import Split
from evomerge.plan import ModelHeader, config_value

if TYPE_CHECKING:
    from evomerge.evaluation import TaskSet
    from evomerge.evaluation.items import Items

_MANY = 300
"""Scoring every candidate on more search items per task than this is rarely worth it (docs/tasks.md)."""


def load_tasks(
    config: SearchConfig, wanted: LmEvalConfig, model: ModelHeader, splits: Sequence[Split], *, code_processes: int = 1
) -> "TaskSet":
    """Load the tasks with their requests, ready to be sent to an engine.

    Args:
        config: the configuration.
        wanted: its evaluation.
        model: the model that provides the tokenizer.
        splits: splits that every task must have items of.
        code_processes: number of processes that score the answers to a task that runs code.

    Raises:
        EvaluationError: a task cannot be loaded, has no items on one of the splits, or has items that are longer than `engine.max_model_len`.
    """
    from evomerge.evaluation import TaskSet

    tasks = TaskSet(
        task_specs(config),
        model.folder,
        trust_code=wanted.trust_task_code,
        code_timeout_s=wanted.task_code_timeout_s,
        code_processes=code_processes,
    )
    try:
        for split in splits:
            tasks.items(split)
        if config.engine.max_model_len is not None:
            tasks.check_lengths(config.engine.max_model_len)
    except BaseException:
        tasks.close()
        raise
    return tasks


def describe_items(problem: Problem) -> list[str]:
    """Describe the number of items of each split of each task and their tokens, as a search loads them.

    Raises:
        EvaluationError: see `load_tasks`.
    """
    config, wanted = problem.config, problem.config.evaluation
    if not isinstance(wanted, LmEvalConfig):
        return []
    model, splits = next(iter(problem.headers.values())), needed_splits(config)
    tasks = load_tasks(config, wanted, model, splits)
    try:
        items = {split: tasks.items(split) for split in splits}
    finally:
        tasks.close()
    lines = []
    for name in tasks.names:
        counts = ", ".join(f"{_count(items[split][name])} {split.value}" for split in splits)
        longest = max(items[split][name].longest for split in splits)
        lines.append(f"items       {name}: {counts}; longest {longest:,} tokens")
        dropped = {split.value: items[split][name].n_dropped for split in splits}
        if any(dropped.values()):
            shown = ", ".join(f"{count:,} {split}" for split, count in dropped.items() if count)
            lines.append(
                f"note        {name}: {shown} items also appear in a later split and were dropped (drop_shared)"
            )
        if wanted.search_items is None and len(items[Split.SEARCH][name]) > _MANY:
            lines.append(
                f"note        {name}: every candidate is scored on all these search items; with evaluation.search_items, e.g. 50, the same number "
                "of scored items gives more candidates"
            )
    search = items[Split.SEARCH].values()
    asked = sum(len(part.likelihoods) + len(part.generations) for part in search)
    read = sum(part.prompt_tokens for part in search)
    written = sum(request.max_tokens for part in search for request in part.generations)
    most = f", at most {written:,} generated tokens" if written else ""
    lines.append(f"candidate   {asked:,} requests on search, {read:,} prompt tokens{most}")
    positions = config_value(model.config, *POSITIONS)
    longest = max(part.longest for parts in items.values() for part in parts.values())
    if config.engine.max_model_len is None and isinstance(positions, int) and longest > positions:
        lines.append(
            f"note        the models' config.json allows {positions:,} positions, fewer than the longest item needs, so the engine will refuse it; "
            "shorten the prompts, or lower generation_kwargs.max_gen_toks in the task file"
        )
    return lines


def _count(items: "Items") -> str:
    """The number of items, and if they are a sample, of how many they were drawn from."""
    drawn_from = sum(round(part.represents * (len(part) + part.n_dropped)) for part in items.parts)
    return f"{len(items):,}" + (f" of {drawn_from:,}" if drawn_from > len(items) + items.n_dropped else "")
