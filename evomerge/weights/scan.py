"""Looking through tensors for values that no merge can use, at the speed of memory."""

import numba
import numpy as np
import torch

from evomerge.weights.blocks import BLOCK, as_bits, load_block
from evomerge.weights.fused.kernels import load_window, magnitude_of
from evomerge.weights.fused.lanes import LANES, bits_of, largest_word, select, words
from evomerge.weights.fused.tables import kind_of

_INFINITE_BITS = {torch.bfloat16: 0x7F800000, torch.float16: 0x47800000, torch.float32: 0x7F800000}
"""from these float32 magnitudes on, a loaded value was an infinity or NaN (float16 ones load as 65536 and above)"""


def first_bad_element(tensor: torch.Tensor) -> int | None:
    """Flat index of the first NaN or infinity in a float tensor; None where all are finite."""
    kind = kind_of(tensor)
    if kind is None:
        bad = (~torch.isfinite(tensor)).reshape(-1).nonzero()
        return int(bad[0, 0]) if len(bad) else None
    index = int(_first_from(tensor.data_ptr(), kind, tensor.numel(), np.uint32(_INFINITE_BITS[tensor.dtype])))
    return None if index < 0 else index


@numba.njit(cache=True, nogil=True, inline="never")
def _largest(address, kind, first, last):  # type: ignore[no-untyped-def]
    """The largest magnitude of elements [first, last), whole windows, as float32 bits."""
    largest = words(np.uint32(0))
    for window in range(first, last, LANES):
        bits = bits_of(magnitude_of(load_window(address, kind, window)))
        largest = select(bits > largest, bits, largest)
    return largest_word(largest)


@numba.njit(cache=True, nogil=True)
def _first_from(address, kind, n_elements, limit):  # type: ignore[no-untyped-def]
    """Flat index of the first element whose magnitude has at least the bits `limit`; -1 where there is none."""
    block = np.empty(BLOCK, np.float32)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        if count == BLOCK and _largest(address, kind, start, start + BLOCK) < limit:
            continue
        load_block(address, kind, start, count, block)
        for i in range(count):
            if as_bits(block[i]) & np.uint32(0x7FFFFFFF) >= limit:
                return start + i
    return -1
