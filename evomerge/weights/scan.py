"""Looking through tensors for values that no merge can use."""

import torch

_CHUNK = 1 << 20
"""elements per step: the temporaries stay in the cache"""


def first_bad_element(tensor: torch.Tensor) -> int | None:
    """Flat index of the first NaN or infinity in a float tensor; None where all are finite."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        # x - x is 0 for finite x and NaN for others: one pass, one reduction
        if not bool((chunk - chunk == 0).all()):
            return start + int((~torch.isfinite(chunk)).nonzero()[0, 0])
    return None
