"""model_stock: interpolate between the base and the experts' average, by the angle between their task vectors (arXiv 2403.19522).

c = mean pairwise cosine of the task vectors; t = N c / (1 + (N - 1) c), or 0 if the denominator vanishes;
t mean(theta_i) + (1 - t) theta_base. Per tensor, or per row with `filter_wise`.
"""

from itertools import combinations

import torch

from evomerge.weights.row_blocks import by_rows
from evomerge.weights.task_vectors import in_order_sum
from evomerge.weights.tensor_group import TensorGroup

_TINY = 1e-6


def merge(group: TensorGroup) -> torch.Tensor:
    """The point between the base and the average."""
    base, sources = group.required_base(), group.tensors
    if group.shared["filter_wise"] and base.dim() > 1 and base.numel():
        t = by_rows(shares, [base, *sources], base.dtype).reshape(*base.shape[:-1], 1)
    else:
        t = shares(*[tensor.reshape(1, -1) for tensor in (base, *sources)]).reshape([1] * base.dim())
    average = in_order_sum(sources) / len(sources)
    return t * average + (1 - t) * base


def shares(base: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """t for every row of the matrices, (rows,)."""
    deltas = [source - base for source in sources]
    cosines = []
    for a, b in combinations(deltas, 2):
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        cosines.append(((a * b).sum(dim=-1) / norms.clamp(min=_TINY)).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(dim=0)
    count = len(sources)
    denominator = 1 + (count - 1) * cosine
    return torch.where(denominator.abs() < _TINY, torch.zeros_like(cosine), count * cosine / denominator)
