"""L1 norms behind `rescale`: of what a random mask keeps, for every density at once, and the scales that follow from norms.

A search has one seed, so an element's random number is the same in every candidate and only the density moves. What all densities keep is
therefore known once the magnitudes have been added up by number: then no candidate has to read its sources for a norm.

Sums are exact, hence the same in any order, on any number of threads and on a GPU: addends are rounded to multiples of one
power of two, small enough to change a norm by less than 2^-52 of the whole for each element, and large enough that every sum fits float64.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from evomerge.weights.fused.blocks import BLOCK, load_delta, round_block
from evomerge.weights.fused.lanes import LANES, lane_of, store_halves
from evomerge.weights.fused.masks import decisions
from evomerge.weights.philox import DECISIONS
from evomerge.weights.task_vectors import TINY_SUM


class Norms(NamedTuple):
    """L1 norms of a delta and of what pruning keeps of it; that one is None where it is to be measured when it is pruned."""

    whole: float
    kept: float | None


def addend_grid(norm: float) -> float:
    """What is added to an addend and taken away again, in float64, to round it for sums of at most `norm`. 0 where nothing would be rescaled."""
    if not TINY_SUM <= norm <= 2.0**125:
        return 0.0
    # float64 of this size are 2^-51 of a power of two above `norm` apart
    return 1.5 * 2.0 ** (math.frexp(norm)[1] + 1)


def scales(whole: NDArray[np.float64], kept: NDArray[np.float64], precision: int) -> NDArray[np.float32]:
    """What gives pruned deltas of L1 norm `kept` that of `whole`, as arithmetic of this precision holds it: (n,) each."""
    scale = np.divide(whole, kept, out=np.ones_like(whole), where=(whole >= TINY_SUM) & (kept >= TINY_SUM))
    held = scale.astype(np.float32)
    round_block(held, held.size, precision)
    return held


@numba.njit(cache=True, nogil=True)
def kept_norms(delta, n_elements, key0, key1, ranks, step, grid):  # type: ignore[no-untyped-def]
    """L1 norm of the elements of a `evomerge.weights.fused.tables.Delta` of which `decisions` is below k, for every k: (DECISIONS + 1,) float64."""
    norms = np.zeros(DECISIONS + 1, np.float64)
    base, block, numbers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(LANES, np.uint16)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        load_delta(delta, start, count, base, block)
        for window in range(0, count, LANES):
            store_halves(numbers.ctypes.data, decisions(np.uint64(key0), np.uint64(key1), ranks, step, start + window))
            for element in range(min(LANES, count - window)):
                norms[np.int64(numbers[lane_of(element)]) + 1] += (
                    np.float64(abs(block[window + element])) + grid
                ) - grid
    for k in range(DECISIONS):
        norms[k + 1] += norms[k]
    return norms
