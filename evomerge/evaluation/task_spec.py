"""`TaskSpec`: which lm-eval task or group, which metric, which of its items, and how they are put to the model. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

from evomerge.core import EvaluationError, Split
from evomerge.evaluation.split_parts import always_share_rows, part_range, split_name


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How a task's text is put to the model: lm-eval's options of these names.

    Attributes:
        apply_chat_template: as a conversation, in the form of the tokenizer's chat template.
        system_instruction: stands before the task's own description.
        fewshot_as_multiturn: with a chat template, examples are earlier turns of the conversation; else part of one question.
    """

    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task of a run, or a group of tasks with one score.

    Attributes:
        task: path of an lm-eval task or group file (`*.yaml`), or a name that lm-eval knows.
        metric: a metric of the task, or `metric,filter` as lm-eval prints it; None = the first metric that is a mean over items, else
            the first, and the first filter.
        name: what the score is called; None = the task's own name.
        splits: our split -> the data set's split, or a part of it (`train[:60%]`); a split that is not given is looked for under its own
            name.
        limit: use only the first so many items of every split.
        search_items: so many items of `search` (after `limit`) are drawn at random by `seed`, the rest is left out; None = all. Of a larger
            number those of a smaller are part.
        seed: of that draw.
        num_fewshot: solved examples before each item; None = as many as the task says, and its group where that says something else.
        group_fewshot: what its group says in place of the task's own number; None = nothing.
        drop_shared: leave items out of `search` that stand in `select` or `report` too, and out of `select` those of `report`.
        prompt: how items are put to the model.
        window: tokens of the pieces in which whole texts are scored (`output_type: loglikelihood_rolling`); None where no task does.
        members: of a group its tasks, each with all that is said here of it; empty for a task.
        weight_by_size: whether the members count by their numbers of items, or all the same.
    """

    task: str
    metric: str | None = None
    name: str | None = None
    splits: Mapping[Split, str] = field(default_factory=dict)
    limit: int | None = None
    search_items: int | None = None
    seed: int = 0
    num_fewshot: int | None = None
    group_fewshot: int | None = None
    drop_shared: bool = False
    prompt: PromptFormat = PromptFormat()
    window: int | None = None
    members: "tuple[TaskSpec, ...]" = ()
    weight_by_size: bool = True

    def __post_init__(self) -> None:
        """Raises EvaluationError on a limit below one, fewer than no examples, or data splits that are no splits or overlap."""
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"task {self.task!r}: limit must be at least 1, got {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise EvaluationError(f"task {self.task!r}: num_fewshot must be at least 0, got {self.num_fewshot}")
        for split, part in self.splits.items():
            try:
                part_range(part, 0)
            except EvaluationError as error:
                raise EvaluationError(f"task {self.task!r}, split {split.value}: {error}") from None
        for one, two in combinations(self.splits, 2):
            first, second = self.splits[one], self.splits[two]
            if always_share_rows(first, second):
                shown = f"{first} is given to both" if first == second else f"{first} and {second} overlap for"
                raise EvaluationError(
                    f"task {self.task!r}: {shown} {one.value} and {two.value}, which must be disjoint; parts of a split are written as "
                    "train[:60%], train[60%:80%], train[80%:]"
                )

    @property
    def tasks(self) -> "tuple[TaskSpec, ...]":
        """The tasks of a group; a task itself."""
        return self.members or (self,)

    def n_examples(self, own: int | None) -> int | None:
        """How many solved examples a task gets whose file says `own`; as in lm-eval, none where it, or its group, says 0."""
        said = own if self.group_fewshot is None else self.group_fewshot
        return said if self.num_fewshot is None or said == 0 else self.num_fewshot

    def data_split(self, split: Split) -> str | None:
        """The data set's name of `split`; None where the part of that name was given another role."""
        part = self.splits.get(split, split.value)
        taken = map(split_name, self.splits.values())
        return None if split not in self.splits and part in taken else part
