"""Normal noise as a function of (seed, output tensor, element): the quantile that the upper half of a Philox word picks from a table.

A table instead of a formula, so that every device gives the same bits. Its 2^16 values are the normal quantiles in the middle
of equally likely bins, scaled to unit variance; the largest is 4.2.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.weights.philox import mask_key, random_words

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
    words = random_words(noise_key(seed, output), start, count)
    return torch.from_numpy(quantiles()[words >> np.uint32(32 - TABLE_BITS)])
