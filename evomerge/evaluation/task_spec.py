"""`TaskSpec`: an lm-eval task or group, its metric, its items, and how these are presented to the model. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

from evomerge.core import EvaluationError, Split
from evomerge.evaluation.split_parts import always_share_rows, part_range, split_name


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How a task's text is presented to the model: lm-eval's options of the same names.

    Attributes:
        apply_chat_template: format prompts as a conversation, with the tokenizer's chat template.
        system_instruction: text before the task's own description.
        fewshot_as_multiturn: with a chat template, present examples as earlier turns of the conversation instead of in one question.
    """

    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task of a run, or a group of tasks with one score.

    Attributes:
        task: path of an lm-eval task or group file (`*.yaml`), or a name in lm-eval.
        metric: a metric of the task, or `metric,filter` as lm-eval prints it; None = the first metric that is a mean over items, else
            the first, and the first filter.
        name: name of the score; None = the task's own name.
        splits: our split -> the data set's split, or a part of it (`train[:60%]`); a missing split is looked up under its own
            name.
        limit: maximum number of items of every split, taken from its beginning.
        search_items: number of items of `search` (after `limit`) to draw at random with `seed`; None = all. A larger draw contains every
            smaller one.
        seed: of that draw.
        num_fewshot: solved examples before each item; None = the number set by the task, or by its group if that overrides it.
        group_fewshot: the group's override of the task's own number; None = none.
        drop_shared: leave items out of `search` that are also in `select` or `report`, and items out of `select` that are in `report`.
        prompt: how items are presented to the model.
        window: tokens per piece when whole texts are scored (`output_type: loglikelihood_rolling`), which needs it.
        members: for a group, its tasks, each with its complete settings; empty for a task.
        weight_by_size: weight the members by their numbers of items instead of equally.
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
        """Raise EvaluationError for a limit below one, a negative number of examples, or data splits that are malformed or overlap."""
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
                shown = f"{first} is assigned to both" if first == second else f"{first} and {second} overlap for"
                raise EvaluationError(
                    f"task {self.task!r}: {shown} {one.value} and {two.value}, which must be disjoint; parts of a split are written as "
                    "train[:60%], train[60%:80%], train[80%:]"
                )

    @property
    def tasks(self) -> "tuple[TaskSpec, ...]":
        """The tasks of a group; for a task, the task itself."""
        return self.members or (self,)

    def n_examples(self, own: int | None) -> int | None:
        """Number of solved examples for a task whose file says `own`; as in lm-eval, none if the task or its group says 0."""
        said = own if self.group_fewshot is None else self.group_fewshot
        return said if self.num_fewshot is None or said == 0 else self.num_fewshot

    def data_split(self, split: Split) -> str | None:
        """The data set's name for `split`; None if the data split of that name is already assigned to another of our splits."""
        part = self.splits.get(split, split.value)
        taken = map(split_name, self.splits.values())
        return None if split not in self.splits and part in taken else part
