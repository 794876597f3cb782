"""Random masks as functions: Philox4x32-10 (Salmon et al., SC 2011) keyed by (seed, output tensor, input), counted by element.

Element i of a tensor takes word i mod 4 of counter i div 4, so a mask is the same on every device, at any chunking and
sharding, and never needs to be stored.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
ROUNDS = 10


def mask_key(seed: int, output: str, position: int) -> tuple[int, int]:
    """The two 32-bit key words for input number `position` of the output tensor `output`.

    The position and not the model's path is used, so that a moved model folder does not change a recipe's result.
    """
    digest = hashlib.sha256(f"{seed}\0{position}\0{output}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def keep_threshold(probability: float) -> int:
    """A word below this number (of 2^32) means "keep"; 2^32 keeps all."""
    return min(max(round(probability * 2**32), 0), 2**32)


def random_words(key: tuple[int, int], start: int, count: int) -> NDArray[np.uint32]:
    """Words of elements [start, start + count): (count,) uint32."""
    first, last = start // 4, -(-(start + count) // 4)
    counter = np.arange(first, last, dtype=np.uint64)
    zero = np.zeros_like(counter)
    words = [counter & _LOW, counter >> _SHIFT, zero, zero]
    low_key, high_key = key
    for _ in range(ROUNDS):
        product0, product1 = np.uint64(MULTIPLIERS[0]) * words[0], np.uint64(MULTIPLIERS[1]) * words[2]
        words = [
            (product1 >> _SHIFT) ^ words[1] ^ np.uint64(low_key),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ words[3] ^ np.uint64(high_key),
            product0 & _LOW,
        ]
        low_key, high_key = (low_key + WEYL[0]) & 0xFFFFFFFF, (high_key + WEYL[1]) & 0xFFFFFFFF
    interleaved = np.stack(words, axis=1).reshape(-1).astype(np.uint32)
    return interleaved[start - 4 * first : start - 4 * first + count]


def keep_mask(key: tuple[int, int], shape: torch.Size | tuple[int, ...], probability: float) -> torch.Tensor:
    """A boolean mask of `shape` on the CPU, each element kept with `probability`."""
    count = int(np.prod(shape, dtype=np.int64))
    words = random_words(key, 0, count)
    return torch.from_numpy(words.astype(np.int64) < keep_threshold(probability)).reshape(shape)
