"""Normal noise as a function of (seed, output tensor, element): the upper half of a Philox word selects a quantile from a table.

A table is used instead of a formula so that every device gives the same bits. Its 2^16 values are the normal quantiles at the middles
of equally likely bins, scaled to unit variance; the largest is 4.2.
"""

from functools import cache

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.weights.philox import MULTIPLIERS, WEYL, WORD_ROUNDS, mask_key

TABLE_BITS = 16

_AT_ONCE = 256
"""number of counters (four words each) processed at a time, so that their words stay in the first-level cache"""


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
    """Write the noise of elements from `start` on; element i takes word i mod 4 of counter i div 4."""
    words = np.empty(4 * _AT_ONCE, np.uint32)
    end = start + noise.shape[0]
    for first in range(start // 4, (end + 3) // 4, _AT_ONCE):
        _philox(key0, key1, first, words)
        for element in range(max(start, 4 * first), min(end, 4 * (first + _AT_ONCE))):
            noise[element - start] = table[words[element - 4 * first] >> np.uint32(32 - TABLE_BITS)]


@numba.njit(cache=True, nogil=True, inline="never")
def _philox(key0, key1, first, words):  # type: ignore[no-untyped-def]
    """Fill `words` with the words of the counters from `first` on, as in `evomerge.weights.philox.philox`."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for c in range(words.shape[0] // 4):
        counter = np.uint64(first + c)
        x0, x1 = counter & low, counter >> half
        x2, x3 = np.uint64(0), np.uint64(0)
        k0, k1 = np.uint64(key0), np.uint64(key1)
        for _ in range(WORD_ROUNDS):
            product0, product1 = np.uint64(MULTIPLIERS[0]) * x0, np.uint64(MULTIPLIERS[1]) * x2
            x0, x2 = (product1 >> half) ^ x1 ^ k0, (product0 >> half) ^ x3 ^ k1
            x1, x3 = product1 & low, product0 & low
            k0, k1 = (k0 + np.uint64(WEYL[0])) & low, (k1 + np.uint64(WEYL[1])) & low
        words[4 * c] = np.uint32(x0)
        words[4 * c + 1] = np.uint32(x1)
        words[4 * c + 2] = np.uint32(x2)
        words[4 * c + 3] = np.uint32(x3)
