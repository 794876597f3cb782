"""sce: select the entries in which the experts differ most, weight experts by their energy there, and erase minority signs (arXiv 2408.07990).

If `select_topk` < 1, only that fraction of the entries with nonzero variance over the task vectors is kept (of equal
variances, the first). omega_i = mean(d_i^2) / sum, uniform if the sum vanishes; signs as in TIES on unweighted vectors;
theta_base + sum(omega d) / sum(omega) over the entries that agree.
"""

import torch

from evomerge.weights.task_vectors import falling, in_order_sum, marked
from evomerge.weights.tensor_group import TensorGroup

_TINY = 1e-6


def merge(group: TensorGroup) -> torch.Tensor:
    """Energy-weighted mean of the selected entries whose signs agree, added to the base."""
    base = group.required_base()
    deltas = torch.stack([tensor - base for tensor in group.tensors])
    share = float(group.shared["select_topk"])
    if share < 1:
        deltas = torch.where(_selected(deltas, share), deltas, torch.zeros_like(deltas))
    elected = torch.where(in_order_sum(list(deltas)) >= 0, 1.0, -1.0).to(base.dtype)
    weights = expert_weights(deltas.square().reshape(len(deltas), -1).mean(dim=1, dtype=torch.float64).to(base.dtype))
    agreeing = (deltas.sign() == elected) * weights.reshape(-1, *[1] * base.dim())
    return base + in_order_sum(list(deltas * agreeing)) / in_order_sum(list(agreeing)).clamp(min=_TINY)


def expert_weights(energy: torch.Tensor) -> torch.Tensor:
    """omega of each expert, in the dtype of the arithmetic."""
    total = energy.sum()
    return energy / total if total.abs() >= _TINY else torch.full_like(energy, 1.0 / len(energy))


def n_selected(n_varied: int, share: float) -> int:
    """The number of entries selected if `n_varied` have a nonzero variance."""
    return int(n_varied * share) if share > 0 else 0


def _selected(deltas: torch.Tensor, share: float) -> torch.Tensor:
    """Mask of the entries with the largest variance, in the shape of one delta."""
    variance = deltas.var(dim=0, unbiased=False)
    return marked(variance, falling(variance)[: n_selected(int(torch.count_nonzero(variance)), share)])
