"""The archive of MAP-Elites (arXiv 1504.04909): a grid over behaviour with one elite per cell. The caller stores the elites themselves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class EliteGrid:
    """The best of every cell of a grid over k numbers that describe a behaviour.

    Args:
        low, high: (k,), the outer ends of the outermost cells, which also contain everything beyond; if equal, the axis has a single cell.
        n_bins: number of cells along each of the k axes, >= 1.
    """

    def __init__(self, low: Sequence[float] | Floats, high: Sequence[float] | Floats, n_bins: int) -> None:
        self._low = np.asarray(low, dtype=np.float64)
        self._width = (np.asarray(high, dtype=np.float64) - self._low) / n_bins
        self._n_bins = n_bins
        self._slots: dict[tuple[int, ...], int] = {}
        self._qualities: list[float] = []
        self._behaviours: list[Floats] = []

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, quality: float, behaviour: Floats) -> int | None:
        """Add a newcomer if its cell is empty or has an elite of lower quality, which it replaces.

        Args:
            quality: higher is better.
            behaviour: (k,).

        Returns:
            Its slot: a new one (the previous `len`) if the cell was empty, otherwise that of the replaced elite; None if it was not added.
        """
        cell = self._cell(behaviour)
        slot = self._slots.get(cell)
        if slot is None:
            slot = self._slots[cell] = len(self._qualities)
            self._qualities.append(quality)
            self._behaviours.append(behaviour)
        elif quality > self._qualities[slot]:
            self._qualities[slot], self._behaviours[slot] = quality, behaviour
        else:
            return None
        return slot

    @property
    def n_cells(self) -> int:
        """The number of cells, including empty ones."""
        return int(self._n_bins ** np.count_nonzero(self._width))

    @property
    def qualities(self) -> Floats:
        """The qualities of the elites by slot, (n,)."""
        return np.array(self._qualities, dtype=np.float64)

    @property
    def behaviours(self) -> Floats:
        """The behaviours of the elites by slot, (n, k)."""
        return np.array(self._behaviours, dtype=np.float64).reshape(len(self), len(self._low))

    def score(self, least: float) -> float:
        """The QD score: the sum over all elites of their quality above `least`; 0 for those below it."""
        return float(np.maximum(self.qualities - least, 0.0).sum())

    def _cell(self, behaviour: Floats) -> tuple[int, ...]:
        steps = np.divide(behaviour - self._low, self._width, out=np.zeros(len(self._low)), where=self._width > 0.0)
        return tuple(np.clip(np.floor(steps), 0, self._n_bins - 1).astype(int).tolist())
