"""Counter-based random numbers: Philox4x32 (Salmon et al., SC 2011), keyed by (seed, output tensor, input), with counters by element.

Masks use 16 bits per element: counter c gives words w0 to w3 for elements 8c to 8c + 7, and element 8c + r takes bits
[16 (r div 2), 16 (r div 2) + 16) of w1 + 2^32 w0 if r is even, and of w3 + 2^32 w2 if it is odd (the order that is free for the kernels).
A mask is thus the same on every device, with any chunking and sharding, and never needs to be stored. For the reasons for 16 bits and
seven rounds see `docs/adr/0012-masks-of-sixteen-bits.md`.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

WORD_ROUNDS = 10
"""rounds for words (`evomerge.weights.noise`), the paper's default"""

MASK_ROUNDS = 7
"""rounds for masks: the smallest number that passes all tests of the paper (BigCrush)"""

DECISIONS = 1 << 16
"""probabilities of masks are multiples of 1 / DECISIONS"""


@lru_cache(maxsize=1 << 16)
def mask_key(seed: int, output: str, position: int) -> tuple[int, int]:
    """The two 32-bit key words for input number `position` of the output tensor `output`.

    It depends on the position and not on the model's path, so that moving a model folder does not change a recipe's result.
    """
    digest = hashlib.sha256(f"{seed}\0{position}\0{output}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def keep_threshold(probability: float) -> int:
    """How many of the 2^16 numbers, from 0 on, mean "keep": the nearest to `probability`, but at least one if that is above 0."""
    return min(max(round(probability * DECISIONS), 1), DECISIONS) if probability > 0 else 0


def philox(counter: list[NDArray[np.uint64]], key: tuple[int, int], rounds: int) -> list[NDArray[np.uint64]]:
    """The four words for each counter; a counter is also given as four words, and all words are below 2^32."""
    words = counter
    low_key, high_key = key
    for _ in range(rounds):
        product0, product1 = np.uint64(MULTIPLIERS[0]) * words[0], np.uint64(MULTIPLIERS[1]) * words[2]
        words = [
            (product1 >> _SHIFT) ^ words[1] ^ np.uint64(low_key),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ words[3] ^ np.uint64(high_key),
            product0 & _LOW,
        ]
        low_key, high_key = (low_key + WEYL[0]) & 0xFFFFFFFF, (high_key + WEYL[1]) & 0xFFFFFFFF
    return words


def random_halves(key: tuple[int, int], start: int, count: int) -> NDArray[np.uint16]:
    """The random numbers of masks for elements [start, start + count): (count,) uint16."""
    first = start // 8
    counter = np.arange(first, -(-(start + count) // 8), dtype=np.uint64)
    zero = np.zeros_like(counter)
    w0, w1, w2, w3 = philox([counter & _LOW, counter >> _SHIFT, zero, zero], key, MASK_ROUNDS)
    digits = [(low | high << _SHIFT).astype("<u8").view("<u2").reshape(-1, 4) for low, high in ((w1, w0), (w3, w2))]
    return np.stack(digits, axis=2).reshape(-1).astype(np.uint16)[start - 8 * first :][:count]


def keep_mask(key: tuple[int, int], shape: torch.Size | tuple[int, ...], probability: float) -> torch.Tensor:
    """A boolean mask of `shape` on the CPU, each element kept with `probability` (see `keep_threshold`)."""
    halves = random_halves(key, 0, int(np.prod(shape, dtype=np.int64)))
    return torch.from_numpy(halves.astype(np.int32) < keep_threshold(probability)).reshape(shape)
