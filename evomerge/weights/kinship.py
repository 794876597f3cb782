"""Whether the models of a merge are relatives: a few attention matrices of each are compared with those of the others.

Merging presumes that equal places mean equal things. Someone who does not want a model to be merged can permute or rotate its heads, which
leaves its function alone and makes every merge nonsense; a model of other parentage looks the same. This is said, never undone.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch

from evomerge.plan import ModelHeader
from evomerge.plan.model_header import FLOAT_DTYPES
from evomerge.weights.mapping import ReadTensor

STRANGER_DISTANCE = 0.9
"""relative L2 distance to the nearest other model from which on a model is a stranger. Seen: fine-tuned experts .02 to .06, small ones
that were trained for long and still merge .27 to .54; all heads permuted, rotated, or another parentage 1.2 to 1.6"""

_QUERIES = ("q_proj.weight", "qkv", "c_attn.weight", "query_key_value.weight")
"""in the names of matrices that make queries, alone or with keys and values"""

_N_TENSORS = 3
_N_ROWS = 256


def strangers(headers: Mapping[str, ModelHeader], read: ReadTensor) -> str | None:
    """What to tell the user of models whose attention is far from that of all others; None where all are relatives.

    Args:
        headers: key -> header of models that fit each other.
        read: reads one tensor.
    """
    names = _sample(headers)
    if len(headers) < 2 or not names:
        return None
    products = torch.stack([_products([_rows_of(read(key, name)) for key in headers]) for name in names]).sum(dim=0)
    sizes = dict(zip(headers, products.diagonal().tolist(), strict=True))
    squares = {
        (one, other): max(sizes[one] + sizes[other] - 2 * products[i, j].item(), 0.0)
        for (i, one), (j, other) in combinations(enumerate(headers), 2)
    }
    nearest = dict.fromkeys(headers, math.inf)
    for (one, other), square in squares.items():
        distance = math.sqrt(square / max(min(sizes[one], sizes[other]), 1e-30))
        nearest[one], nearest[other] = min(nearest[one], distance), min(nearest[other], distance)
    far = {key: distance for key, distance in nearest.items() if distance >= STRANGER_DISTANCE}
    if not far:
        return None
    listed = ", ".join(f"{key} ({distance:.2f})" for key, distance in far.items())
    others = [distance for key, distance in nearest.items() if key not in far]
    beside = f"; the others are within {max(others):.2f} of each other" if others else ""
    return (
        f"the attention weights of {listed} are as far from those of every other model as unrelated ones (relative distance in "
        f"brackets{beside}): permuted or rotated against merging, or of another parentage. The merge is unlikely to work"
    )


def _rows_of(matrix: torch.Tensor) -> torch.Tensor:
    """About `_N_ROWS` of its rows, some of every head."""
    return matrix[:: max(1, len(matrix) // _N_ROWS)]


def _products(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of K tensors of one shape, (K, K) in float64."""
    rows = torch.stack([tensor.reshape(-1).float() for tensor in tensors])
    return (rows @ rows.T).double()


def _sample(headers: Mapping[str, ModelHeader]) -> list[str]:
    """Query matrices that all models have in one shape: of the first, the middle and the last layer."""
    first, *others = headers.values()
    names = [
        name
        for name, tensor in first.tensors.items()
        if any(text in name for text in _QUERIES)
        and len(tensor.shape) == 2
        and tensor.dtype in FLOAT_DTYPES
        and all(name in other.tensors and other.tensors[name].shape == tensor.shape for other in others)
    ]
    # files have them in the order of their letters: layer 10 before layer 2
    names.sort(key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])
    wanted = (
        sorted({round(index * (len(names) - 1) / (_N_TENSORS - 1)) for index in range(_N_TENSORS)}) if names else []
    )
    return [names[index] for index in wanted]
