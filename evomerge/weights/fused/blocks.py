"""Compiled building blocks: convert blocks of raw weights to float32 and back.

A block has at most `BLOCK` elements, so everything between load and store stays in the first-level cache. Tensors are passed as
addresses, so that one compiled kernel serves any number of sources and any mixture of dtypes.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from evomerge.weights.fused.emits import emits

BLOCK = 1024
"""elements; a handful of float32 rows of it fill a 32 KB cache"""

BF16, F32, F16, F32_AS_BF16 = 0, 1, 2, 3
"""how a tensor is stored; the last is float32 memory that receives values rounded to bfloat16"""

F16_TINY, F16_TOO_LARGE = np.uint32(0x38800000), np.uint32(0x47800000)
"""float32 magnitudes: the smallest normal float16, and the power of two above the largest"""

ZEROS = 4
"""a tensor of zeros, which is not in memory"""

OVERFLOW_BITS = (0x7F7F8000, 0x7F800000, 0x477FF000, 0x7F7F8000)
"""by kind: float32 magnitudes with these bits or larger become infinite when rounded"""


@emits(types.voidptr, types.int64)
def pointer(builder: Any, address: Any) -> Any:
    """An address as a pointer."""
    return builder.inttoptr(address, cgutils.voidptr_t)


@emits(types.float32, types.uint32)
def as_float(builder: Any, bits: Any) -> Any:
    """The float32 with these bits."""
    return builder.bitcast(bits, ir.FloatType())


@emits(types.uint32, types.float32)
def as_bits(builder: Any, value: Any) -> Any:
    """The bits of a float32."""
    return builder.bitcast(value, ir.IntType(32))


@numba.njit(cache=True, nogil=True, inline="never")
def load_block(address, kind, start, count, block):  # type: ignore[no-untyped-def]
    """Elements [start, start + count) of the tensor at `address` as float32 into `block`."""
    if kind == BF16:
        halves = numba.carray(pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            block[i] = as_float(np.uint32(halves[i]) << np.uint32(16))
    elif kind == F16:
        halves = numba.carray(pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            bits = np.uint32(halves[i])
            # exponent and mantissa moved into place, then the bias corrected: exact for subnormals too
            magnitude = as_float((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
            block[i] = as_float(as_bits(magnitude) | ((bits & np.uint32(0x8000)) << np.uint32(16)))
    elif kind == ZEROS:
        block[:count] = np.float32(0.0)
    else:
        words = numba.carray(pointer(address + 4 * start), count, np.float32)
        for i in range(count):
            block[i] = words[i]


@numba.njit(cache=True, nogil=True)
def _to_bfloat16(bits):  # type: ignore[no-untyped-def]
    """Bits whose upper half is the float32 with these `bits` rounded to nearest even."""
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@numba.njit(cache=True, nogil=True)
def _to_float16(bits):  # type: ignore[no-untyped-def]
    """The float32 bits of the float16 nearest to the float32 with these `bits`."""
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude < F16_TINY:
        # float32 numbers from 0.5 on are as far apart as subnormal float16 numbers
        rounded = as_bits((as_float(magnitude) + np.float32(0.5)) - np.float32(0.5))
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        rounded = (magnitude + np.uint32(0x0FFF) + odd) & np.uint32(0xFFFFE000)
        if rounded >= F16_TOO_LARGE:
            rounded = max(magnitude, np.uint32(0x7F800000))
    return rounded | (bits & np.uint32(0x80000000))


@numba.njit(cache=True, nogil=True, inline="never")
def round_block(block, count, precision):  # type: ignore[no-untyped-def]
    """Round the first `count` values of `block` to `precision` (BF16, F16, or F32 for no rounding)."""
    if precision == BF16:
        for i in range(count):
            block[i] = as_float(_to_bfloat16(as_bits(block[i])) & np.uint32(0xFFFF0000))
    elif precision == F16:
        for i in range(count):
            block[i] = as_float(_to_float16(as_bits(block[i])))


@numba.njit(cache=True, nogil=True)
def load_delta(delta, start, count, base, block):  # type: ignore[no-untyped-def]
    """Load elements [start, start + count) of a `evomerge.weights.fused.tables.Delta` into `block`; `base` is a float32 scratch array."""
    base_address, base_kind, address, kind, precision = delta
    load_block(base_address, base_kind, start, count, base)
    load_block(address, kind, start, count, block)
    if base_kind != precision:
        round_block(base, count, precision)
    if kind != precision:
        round_block(block, count, precision)
    for i in range(count):
        block[i] -= base[i]
    round_block(block, count, precision)


@numba.njit(cache=True, nogil=True, inline="never")
def store_block(address, kind, start, count, block):  # type: ignore[no-untyped-def]
    """Store `block`, rounded to nearest even, and return its largest magnitude as float32 bits (NaN above all)."""
    largest = np.uint32(0)
    for i in range(count):
        magnitude = as_bits(block[i]) & np.uint32(0x7FFFFFFF)
        largest = max(largest, magnitude)
    if kind == BF16:
        halves = numba.carray(pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            halves[i] = np.uint16(_to_bfloat16(as_bits(block[i])) >> np.uint32(16))
    else:
        words = numba.carray(pointer(address + 4 * start), count, np.float32)
        if kind == F32_AS_BF16:
            for i in range(count):
                words[i] = as_float(_to_bfloat16(as_bits(block[i])) & np.uint32(0xFFFF0000))
        else:
            for i in range(count):
                words[i] = block[i]
    return largest
