"""`SeedGram`: inner products of several models over any prefix of their flattened weights, from one pass over them.

Whole tensors are summed once, on first use; a part of a tensor is summed when a split point first falls into it.
All sums are float64. Knows nothing of crossovers.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.plan import TensorStep
from evomerge.weights.pool import WeightPool

Floats = NDArray[np.float64]

_CHUNK = 1 << 20
"""number of elements of each model converted to float64 at a time"""

_REMEMBERED = 1 << 16
"""number of cached positions; split points of extinct lineages are not requested again"""


class SeedGram:
    """The `SeedProducts` of a lineage.

    Args:
        pool: the models.
        chromosomes: for each, the steps of a merge of the K models, in order; a step's inputs are the K tensors.
    """

    def __init__(self, pool: WeightPool, chromosomes: Sequence[Sequence[TensorStep]]) -> None:
        self._pool = pool
        self._steps = [tuple(steps) for steps in chromosomes]
        self._starts = [np.cumsum([0, *(step.n_elements for step in steps)]) for steps in self._steps]
        self._at_starts: dict[int, Floats] = {}
        self._known: dict[tuple[int, int], Floats] = {}

    def before(self, chromosome: int, position: int) -> Floats:
        """Inner products over the first `position` weights of a chromosome: (K, K)."""
        known = self._known.get((chromosome, position))
        if known is None:
            starts = self._starts[chromosome]
            index = int(np.searchsorted(starts, position, side="right")) - 1
            known = self._sums(chromosome)[index]
            if position > starts[index]:
                known = known + self._products(self._steps[chromosome][index], position - int(starts[index]))
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[chromosome, position] = known
        return known

    def _sums(self, chromosome: int) -> Floats:
        """Inner products before each tensor and after the last, (n_tensors + 1, K, K)."""
        if chromosome not in self._at_starts:
            starts = self._starts[chromosome].tolist()
            tables = [
                self._products(step, end - start)
                for step, (start, end) in zip(self._steps[chromosome], pairwise(starts), strict=True)
            ]
            zero = np.zeros_like(tables[0])
            self._at_starts[chromosome] = np.cumsum([zero, *tables], axis=0)
        return self._at_starts[chromosome]

    def _products(self, step: TensorStep, end: int) -> Floats:
        """Inner products over the first `end` elements of a tensor."""
        flat = [self._pool.tensor(*entry.key).reshape(-1) for entry in step.inputs]
        total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
        for first in range(0, end, _CHUNK):
            rows = torch.stack([tensor[first : min(first + _CHUNK, end)].double() for tensor in flat])
            total += rows @ rows.T
        return total.numpy()
