"""Combines several losses: their weighted mean, the candidate with the smallest mean, and a substitute for failed candidates."""

from collections.abc import Sequence

import numpy as np

from evomerge.core import Candidate, Objective, weights_in_mean
from evomerge.strategy.base import Floats, Told


class MeanLoss:
    """The mean loss of results, and the best result so far (the first of equals).

    Args:
        objectives: the m objectives.

    Attributes:
        weights: (m,), with a sum of 1.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        weights = np.array(weights_in_mean(objectives))
        self.weights: Floats = weights / weights.sum()
        self._best: tuple[float, Candidate] | None = None

    def of(self, told: Told) -> float | None:
        """The mean loss of a result; None if it has no losses."""
        return None if told.losses is None else float(np.dot(self.weights, told.losses))

    def add(self, told: Told) -> None:
        """Add a result; ignored if it has no losses."""
        loss = self.of(told)
        if loss is not None and (self._best is None or loss < self._best[0]):
            self._best = (loss, told.candidate)

    def best(self) -> Candidate | None:
        """The best candidate so far; None if there is no result with losses."""
        return None if self._best is None else self._best[1]


def behind_all(losses: Sequence[float] | Floats) -> float:
    """A loss that ranks behind all `losses`: the worst plus their range, or plus 1 if the range is 0."""
    return float(max(losses) + ((max(losses) - min(losses)) or 1.0))
