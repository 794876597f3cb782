"""JAX's default random numbers (Threefry 2x32, before version 0.5), to reproduce the released M2N2 code's initial models in NumPy."""

import numpy as np
from scipy.special import erfinv

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Twenty rounds on pairs of the first and the second half of the counts; (n,) uint32."""
    padded = np.append(counts, np.uint32(0)) if len(counts) % 2 else counts
    x, y = np.split(padded.copy(), 2)
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x += keys[0]
    y += keys[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x += y
            y = (y << np.uint32(bits)) | (y >> np.uint32(32 - bits))
            y ^= x
        x += keys[(group + 1) % 3]
        y += keys[(group + 2) % 3] + np.uint32(group + 1)
    return np.concatenate([x, y])[: len(counts)]


def split(seed: int, n_keys: int) -> np.ndarray:
    """Keys (n_keys, 2) derived from the seed's key."""
    key = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return _threefry(key, np.arange(2 * n_keys, dtype=np.uint32)).reshape(n_keys, 2)


def normal(key: np.ndarray, n: int) -> np.ndarray:
    """(n,) float32, standard normal."""
    words = _threefry(key, np.arange(n, dtype=np.uint32))
    uniform = ((words >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1.0)
    low = np.nextafter(np.float32(-1.0), np.float32(0.0))
    return np.float32(np.sqrt(2.0)) * erfinv(np.maximum(low, uniform * (np.float32(1.0) - low) + low))
