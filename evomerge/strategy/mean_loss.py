"""Several losses as one: their mean, perhaps weighted, and the candidate with the smallest."""

import numpy as np

from evomerge.core import Candidate, EvaluationError
from evomerge.strategy.base import Floats, Told


class MeanLoss:
    """The mean loss of results, and the best result so far (the first of equals).

    Args:
        strategy: whose name errors begin with.
        weights: (m,), with a sum of 1; None = all alike.
    """

    def __init__(self, strategy: str, weights: Floats | None = None) -> None:
        self._strategy, self._weights = strategy, weights
        self._best: tuple[float, Candidate] | None = None

    def take(self, told: Told) -> float | None:
        """The mean loss of a result; None where it has no losses."""
        if told.losses is None:
            return None
        loss = float(np.mean(told.losses) if self._weights is None else np.dot(self._weights, told.losses))
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
