"""The numbers that decide which elements random masks keep, window by window, in compiled code."""

import numba

from evomerge.weights.fused.lanes import floats, lessened, load_uint16, prefetch, random_halves, to_halves

_AHEAD = 2048
"""prefetch distance for ranks in bytes; without prefetching, waiting for them took up to a quarter of a mask's time"""


@numba.njit(cache=True, nogil=True, forceinline=True)
def decisions(key0, key1, ranks, step, window):  # type: ignore[no-untyped-def]
    """A number for each element of a window; an element is kept if its number is below a bound common to all elements.

    The numbers are random. If `ranks`, the address of the elements' ranks, is not 0, they are reduced by the number of additional values
    that keep an element of that rank (`evomerge.weights.methods.della.keep_by_rank`), but not below 0.
    """
    numbers = random_halves(key0, key1, window)
    if ranks != 0:
        prefetch(ranks + 2 * window + _AHEAD)
        return lessened(numbers, to_halves(load_uint16(ranks + 2 * window) * floats(step)))
    return numbers
