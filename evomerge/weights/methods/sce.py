"""sce: select the entries in which the experts differ most, weight experts by their energy there, erase minority signs (arXiv 2408.07990).

Below `select_topk` = 1 only that share of the entries with non-zero variance over the task vectors stays (of equal
variances the first). omega_i = mean(d_i^2) / sum, uniform where the sum vanishes; signs as in TIES on unweighted vectors;
theta_base + sum(omega d) / sum(omega) over the entries that agree.
"""

import torch

from evomerge.weights.task_vectors import in_order_sum
from evomerge.weights.tensor_group import TensorGroup

_TINY = 1e-6


def merge(group: TensorGroup) -> torch.Tensor:
    """Energy-weighted mean of the selected entries whose signs agree, added to the base."""
    base = group.required_base()
    deltas = torch.stack([tensor - base for tensor in group.tensors])
    share = float(group.shared["select_topk"])
    if share < 1:
        deltas = deltas * _selected(deltas, share)
    elected = torch.where(in_order_sum(list(deltas)) >= 0, 1.0, -1.0).to(base.dtype)
    energy = deltas.square().reshape(len(deltas), -1).mean(dim=1)
    total = energy.sum()
    weights = energy / total if total.abs() >= _TINY else torch.full_like(energy, 1.0 / len(deltas))
    agreeing = (deltas.sign() == elected) * weights.reshape(-1, *[1] * base.dim())
    return base + (deltas * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=_TINY)


def _selected(deltas: torch.Tensor, share: float) -> torch.Tensor:
    """1 at the entries of largest variance, else 0; in the shape of one delta."""
    variance = deltas.var(dim=0, unbiased=False)
    mask = torch.zeros(variance.numel(), dtype=deltas.dtype, device=deltas.device)
    count = int(int(torch.count_nonzero(variance)) * share) if share > 0 else 0
    order = torch.sort(variance.reshape(-1), descending=True, stable=True).indices
    mask[order[:count]] = 1
    return mask.reshape(variance.shape)
