"""Whether the models of a merge are related: compares a few attention matrices of each with those of the others.

Merging assumes that equal positions have equal meaning. To prevent a model from being merged, its heads can be permuted or rotated, which
does not change its function but makes every merge useless; a model of different origin looks the same. This is reported, never undone.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch

from evomerge.plan import ModelHeader
from evomerge.plan.model_header import FLOAT_DTYPES
from evomerge.weights.mapping import ReadTensor

STRANGER_DISTANCE = 0.9
"""relative L2 distance to the nearest other model from which on a model counts as unrelated. Observed: 0.02 to 0.06 for fine-tuned experts, 0.27 to
0.54 for small ones that were trained for long and can still be merged; 1.2 to 1.6 for permuted or rotated heads or a different origin"""

_QUERIES = ("q_proj.weight", "qkv", "c_attn.weight", "query_key_value.weight")
"""parts of the names of query matrices, alone or fused with keys and values"""

_N_TENSORS = 3
_N_ROWS = 256


def strangers(headers: Mapping[str, ModelHeader], read: ReadTensor) -> str | None:
    """A warning about models whose attention is far from that of all others; None if all are related.

    Args:
        headers: key -> header, of compatible models.
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
        f"the attention weights of {listed} are as far from those of every other model as if they were unrelated (relative distance in "
        f"brackets{beside}): permuted or rotated to prevent merging, or of different origin. The merge is unlikely to work"
    )


def _rows_of(matrix: torch.Tensor) -> torch.Tensor:
    """About `_N_ROWS` of its rows, including some of every head."""
    return matrix[:: max(1, len(matrix) // _N_ROWS)]


def _products(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of K tensors of equal shape, (K, K) in float64."""
    rows = torch.stack([tensor.reshape(-1).float() for tensor in tensors])
    return (rows @ rows.T).double()


def _sample(headers: Mapping[str, ModelHeader]) -> list[str]:
    """Query matrices of the first, the middle and the last layer that have the same shape in all models."""
    first, *others = headers.values()
    names = [
        name
        for name, tensor in first.tensors.items()
        if any(text in name for text in _QUERIES)
        and len(tensor.shape) == 2
        and tensor.dtype in FLOAT_DTYPES
        and all(name in other.tensors and other.tensors[name].shape == tensor.shape for other in others)
    ]
    # files list them in alphabetical order: layer 10 before layer 2
    names.sort(key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])
    wanted = (
        sorted({round(index * (len(names) - 1) / (_N_TENSORS - 1)) for index in range(_N_TENSORS)}) if names else []
    )
    return [names[index] for index in wanted]
