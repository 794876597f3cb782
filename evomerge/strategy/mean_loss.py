"""Several losses as one: their weighted mean, the candidate with the smallest, and what stands for a failed one."""

from collections.abc import Sequence

import numpy as np

from evomerge.core import Candidate, EvaluationError, Objective, weights_in_mean
from evomerge.strategy.base import Floats, Told


class MeanLoss:
    """The mean loss of results, and the best result so far (the first of equals).

    Args:
        strategy: whose name errors begin with.
        objectives: m of them, whose losses results have.

    Attributes:
        weights: (m,), with a sum of 1.
    """

    def __init__(self, strategy: str, objectives: Sequence[Objective]) -> None:
        self._strategy = strategy
        weights = np.array(weights_in_mean(objectives))
        self.weights: Floats = weights / weights.sum()
        self._best: tuple[float, Candidate] | None = None

    def take(self, told: Told) -> float | None:
        """The mean loss of a result; None where it has no losses."""
        if told.losses is None:
            return None
        loss = float(np.dot(self.weights, told.losses))
        if self._best is None or loss < self._best[0]:
            self._best = (loss, told.candidate)
        return loss

    @property
    def best(self) -> Candidate:
        """The best candidate so far.

        Raises:
            EvaluationError: no evaluation has ended well yet.
        """
        if self._best is None:
            raise EvaluationError(f"strategy {self._strategy}: nothing to recommend, no evaluation has ended well yet")
        return self._best[1]

    def __bool__(self) -> bool:
        return self._best is not None


def behind_all(losses: Sequence[float] | Floats) -> float:
    """A loss that ranks last among `losses`: the worst plus their range, which counts as 1 where it is 0."""
    return float(max(losses) + ((max(losses) - min(losses)) or 1.0))
