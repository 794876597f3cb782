"""Independent named random streams from one seed; evomerge never uses a global generator."""

import hashlib

import numpy as np


def random_stream(seed: int, *names: str | int) -> np.random.Generator:
    """A PCG64DXSM generator for the stream called `names` under `seed`.

    The same seed and names give the same numbers on every machine; streams with different names are independent
    (`SeedSequence` spawn keys derived from the SHA-256 of the names).
    """
    key = [int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "little") for name in names]
    return np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=key)))
