"""A group of tasks scored as one: the items of all its tasks, weighted so that their mean is lm-eval's group score."""

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from evomerge.core import EvaluationError, Split
from evomerge.engine import Generation, LogLikelihood
from evomerge.evaluation.items import Items
from evomerge.evaluation.loaded_task import LoadedTask
from evomerge.evaluation.sandbox import SandboxedTask


class GroupedTask:
    """Like `LoadedTask`, for the tasks of a group.

    Args:
        name: name of its score.
        members: its loaded tasks.
        weight_by_size: weight tasks by their numbers of items instead of equally.

    Raises:
        EvaluationError: the tasks are scored by different metrics or filters.
    """

    def __init__(self, name: str, members: Sequence[LoadedTask | SandboxedTask], *, weight_by_size: bool) -> None:
        self.name, self._members, self._weight_by_size = name, tuple(members), weight_by_size
        first = members[0]
        for member in members:
            if (member.metric, member.filter) != (first.metric, first.filter):
                raise EvaluationError(
                    f"group {name!r}: {first.name!r} is scored by {first.metric},{first.filter} and {member.name!r} by "
                    f"{member.metric},{member.filter}; choose one of their scores with metric"
                )
        self.splits: Mapping[Split, GroupedItems] = {
            split: self._items(split) for split in Split if all(split in member.splits for member in members)
        }

    def items(self, split: Split) -> "GroupedItems":
        """See `LoadedTask.items`."""
        return self.splits[split] if split in self.splits else self._items(split)

    def _items(self, split: Split) -> "GroupedItems":
        parts = [member.items(split) for member in self._members]
        return GroupedItems(f"group {self.name!r}, {split.value} split", parts, weight_by_size=self._weight_by_size)


class GroupedItems(Items):
    """Items of one split of a `GroupedTask`: those of its first task, then those of the second, and so on.

    An item's score is multiplied by the weight of its task in the group divided by its task's share of the items. With `weight_by_size` a task's
    weight is the number of items that its items were drawn from, so that the factor is 1 if none were left out; otherwise tasks have equal weights.
    """

    def __init__(self, where: str, parts: Sequence[Items], *, weight_by_size: bool) -> None:
        super().__init__(
            where,
            [one for part in parts for one in part.likelihoods],
            [one for part in parts for one in part.generations],
            [count for part in parts for count in part.counts],
            sum(part.n_dropped for part in parts),
        )
        self._parts = tuple(parts)
        counted = [part.represents * len(part) if weight_by_size else 1.0 for part in parts]
        self._weights = [
            count * len(self) / (sum(counted) * len(part)) for count, part in zip(counted, parts, strict=True)
        ]

    @property
    def parts(self) -> tuple[Items, ...]:
        """The items of each task."""
        return self._parts

    def check_lengths(self, max_length: int) -> None:
        """See `Items.check_lengths`; the message names the item's task."""
        for part in self._parts:
            part.check_lengths(max_length)

    def score(self, likelihoods: Sequence[LogLikelihood], generations: Sequence[Generation]) -> NDArray[np.float64]:
        """See `Items.score`, weighted."""
        scores, n_likelihoods, n_generations = [], 0, 0
        for part, weight in zip(self._parts, self._weights, strict=True):
            end, generations_end = n_likelihoods + len(part.likelihoods), n_generations + len(part.generations)
            scores.append(
                weight * part.score(likelihoods[n_likelihoods:end], generations[n_generations:generations_end])
            )
            n_likelihoods, n_generations = end, generations_end
        return np.concatenate(scores)

    def target(self, number: int) -> str | None:
        """See `Items.target`."""
        targets = ((part, place) for part in self._parts for place in range(len(part)))
        part, place = next(islice(targets, number, None))
        return part.target(place)
