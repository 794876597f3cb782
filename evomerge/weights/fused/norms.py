"""L1 norms for `rescale`: of the elements kept by a random mask, for every density at once, and the resulting scales.

A search has one seed, so an element's random number is the same in every candidate and only the density changes. Once the magnitudes have
been summed by random number, the norms for all densities are known, and no candidate has to read its sources for a norm.

Sums are exact, hence the same in any order, with any number of threads and on a GPU: addends are rounded to multiples of one
power of two, small enough to change a norm by less than 2^-52 of the whole for each element, and large enough that every sum fits in float64.
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
    """L1 norms of a delta and of its pruned form; `kept` is None if it must be measured during pruning."""

    whole: float
    kept: float | None


def addend_grid(norm: float) -> float:
    """The number that is added to an addend and subtracted again, in float64, to round it for sums of at most `norm`; 0 if nothing is rescaled."""
    if not TINY_SUM <= norm <= 2.0**125:
        return 0.0
    # float64 numbers of this size have a spacing of 2^-51 times a power of two above `norm`
    return 1.5 * 2.0 ** (math.frexp(norm)[1] + 1)


def scales(whole: NDArray[np.float64], kept: NDArray[np.float64], precision: int) -> NDArray[np.float32]:
    """Scales that restore the L1 norm `whole` of pruned deltas with norm `kept`, rounded to this precision; (n,) each."""
    scale = np.divide(whole, kept, out=np.ones_like(whole), where=(whole >= TINY_SUM) & (kept >= TINY_SUM))
    held = scale.astype(np.float32)
    round_block(held, held.size, precision)
    return held


@numba.njit(cache=True, nogil=True)
def kept_norms(delta, n_elements, key0, key1, ranks, step, grid):  # type: ignore[no-untyped-def]
    """For every k, the L1 norm of the elements of a `evomerge.weights.fused.tables.Delta` whose `decisions` are below k: (DECISIONS + 1,) float64."""
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
