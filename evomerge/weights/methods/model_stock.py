"""model_stock: how far to go from the base to the experts' average, from the angle between their task vectors (arXiv 2403.19522).

c = mean pairwise cosine of the task vectors; t = N c / (1 + (N - 1) c), 0 where the denominator vanishes;
t mean(theta_i) + (1 - t) theta_base. Per tensor, or per row with `filter_wise`.
"""

from itertools import combinations

import torch

from evomerge.weights.tensor_group import TensorGroup

_TINY = 1e-6


def merge(group: TensorGroup) -> torch.Tensor:
    """The point between base and average."""
    base = group.required_base()
    by_row = bool(group.shared["filter_wise"]) and base.dim() > 1

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if by_row else tensor.reshape(1, -1)

    origin = rows(base)
    sources = [rows(tensor) for tensor in group.tensors]
    deltas = [source - origin for source in sources]
    cosines = []
    for a, b in combinations(deltas, 2):
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        cosines.append(((a * b).sum(dim=-1) / norms.clamp(min=_TINY)).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(dim=0).unsqueeze(-1)
    count = len(sources)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < _TINY
    t = torch.where(singular, torch.zeros_like(cosine), count * cosine / denominator)
    average = torch.stack(sources).sum(dim=0) / count
    return (t * average + (1 - t) * origin).reshape(base.shape)
