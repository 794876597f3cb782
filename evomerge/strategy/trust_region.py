"""The box in which a Gaussian process is trusted, for spaces of many dimensions: TuRBO's rules (arXiv 1910.01739).

It is centred on the best known point, doubles after several successes in a row, and halves after as many consecutive failures as there
are dimensions (at least four). Knows neither models nor acquisition functions.
"""

import numpy as np

from evomerge.archive import hypervolume, non_dominated_mask
from evomerge.strategy.base import Floats

_FIRST, _LONGEST, _SHORTEST = 0.8, 1.6, 0.5**7
_SUCCESSES = 3
"""TuRBO's initial, largest and smallest side length of the box in unit coordinates, and the number of successes before it doubles."""


class TrustRegion:
    """One box of [0, 1]^d.

    Attributes:
        length: its side length, before scaling by the models' length scales.
    """

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self.length = _FIRST
        self._n_successes = self._n_failures = 0

    def learn(self, success: bool) -> None:
        """Record whether a proposal from the box was better than all earlier ones."""
        self._n_successes = self._n_successes + 1 if success else 0
        self._n_failures = 0 if success else self._n_failures + 1
        if self._n_successes >= _SUCCESSES:
            self.length, self._n_successes = min(2.0 * self.length, _LONGEST), 0
        elif self._n_failures >= max(4, self._dimension):
            self.length, self._n_failures = self.length / 2.0, 0

    @property
    def exhausted(self) -> bool:
        """Whether it has become so small that the search should restart elsewhere."""
        return self.length < _SHORTEST

    def box(self, centre: Floats, length_scales: Floats) -> Floats:
        """Lower and upper bounds (2, d) around `centre` (d,): longer in directions in which the models vary slowly, with the same volume, then clipped."""
        half = 0.5 * self.length * length_scales / np.exp(np.mean(np.log(length_scales)))
        return np.asarray(np.clip(np.stack([centre - half, centre + half]), 0.0, 1.0))


def centre_of(points: Floats, losses: Floats) -> Floats:
    """The point (d,) to search around: the best, or the one with the largest hypervolume contribution (arXiv 2109.10964)."""
    front = np.flatnonzero(non_dominated_mask(losses))
    if losses.shape[1] == 1 or len(front) == 1:
        return np.asarray(points[front[0]])
    values = losses[front]
    spread = np.ptp(values, axis=0)
    reference = values.max(axis=0) + 0.1 * np.where(spread > 0.0, spread, 1.0)
    without = [hypervolume(np.delete(values, row, axis=0), reference) for row in range(len(front))]
    return np.asarray(points[front[int(np.argmin(without))]])
