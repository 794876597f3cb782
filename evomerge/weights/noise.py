"""Normal noise as a function of (seed, output tensor, element): the quantile that the upper half of a Philox word picks from a table.

A table instead of a formula, so that every device gives the same bits. Its 2^16 values are the normal quantiles in the middle
of equally likely bins, scaled to unit variance; the largest is 4.2.
"""

from functools import cache

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.weights.blocks import BLOCK, philox_block
from evomerge.weights.philox import mask_key

TABLE_BITS = 16


@cache
def quantiles() -> NDArray[np.float32]:
    """The table, (2^16,), increasing, mean 0, variance 1."""
    from scipy.special import ndtri

    size = 1 << TABLE_BITS
    upper = ndtri((np.arange(size // 2, size) + 0.5) / size)
    upper /= np.sqrt(np.mean(upper**2))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


def noise_key(seed: int, output: str) -> tuple[int, int]:
    """The Philox key of the noise `seed` on the output tensor `output`."""
    return mask_key(seed, f"noise\0{output}", 0)


def normal_noise(seed: int, output: str, start: int, count: int) -> torch.Tensor:
    """Elements [start, start + count) of the noise: (count,) float32."""
    noise = np.empty(count, np.float32)
    _fill(*noise_key(seed, output), start, noise, quantiles())
    return torch.from_numpy(noise)


@numba.njit(cache=True, nogil=True)
def _fill(key0, key1, start, noise, table):  # type: ignore[no-untyped-def]
    words = np.empty(BLOCK + 8, np.uint32)
    for first in range(0, noise.shape[0], BLOCK):
        count = min(BLOCK, noise.shape[0] - first)
        skip = philox_block(key0, key1, start + first, count, words)
        for i in range(count):
            noise[first + i] = table[words[skip + i] >> np.uint32(32 - TABLE_BITS)]
