"""Limits on the product of a layer stack's scales, so that the folded form stays within the range of its number format.

Folded weights are divided by the product of the scales so far, and so are the hidden states. Scales below 1 make both grow. Scales
above 1 are harmless over a wide range: the output of a block becomes small compared with a hidden state that keeps its size.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from evomerge.core import SpaceError

GROWTH_BITS: Mapping[str, int] = MappingProxyType({"float16": 10, "bfloat16": 48, "float32": 48})
"""Folding may multiply weights and hidden states by up to two to this power. In float16 that leaves room for values up to 64. In the other
two formats the limit comes from the norms, which square hidden states in float32: beyond 2^64 the square is infinite and a block silently
sees zeros; 48 leaves room for a hidden state of length 2^16."""

SHRINKING_BITS = 126
"""a factor below two to minus this power is subnormal in float32 and loses precision"""


def scale_bounds(n_scales: int, dtype: str) -> tuple[float, float]:
    """The widest bounds of `n_scales` scales whose product can always be folded.

    Args:
        n_scales: maximum number of scales of a stack.
        dtype: the narrowest format in which weights or hidden states are stored.
    """
    count = max(1, n_scales)
    return 2.0 ** (-GROWTH_BITS[dtype] / count), 2.0 ** (SHRINKING_BITS / count)


def check_scales(low: float, high: float, n_scales: int, dtype: str) -> None:
    """Refuse bounds with which some stack would leave the range.

    Args:
        low, high: bounds of every scale, 0 < low <= 1 <= high.
        n_scales, dtype: as in `scale_bounds`.

    Raises:
        SpaceError: the message gives a bound that would work.
    """
    lowest, highest = scale_bounds(n_scales, dtype)
    if low < lowest * (1 - 1e-9):
        raise SpaceError(
            f"stacking.scale_low: {n_scales} scales of {low:g} multiply folded weights and hidden states by 2^{-n_scales * math.log2(low):.0f}, "
            f"but {dtype} has room for 2^{GROWTH_BITS[dtype]}; use at least {math.ceil(1e3 * lowest) / 1e3:g}, or a smaller max_depth"
        )
    if high > highest * (1 + 1e-9):
        raise SpaceError(
            f"stacking.scale_high: {n_scales} scales of {high:g} divide folded weights by 2^{n_scales * math.log2(high):.0f}, "
            f"more than 2^{SHRINKING_BITS}; use at most {math.floor(1e3 * highest) / 1e3:g}, or a smaller max_depth"
        )
