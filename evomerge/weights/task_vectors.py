"""What the task-vector family shares: pruned deltas are weighted, optionally elect a sign, are summed, scaled and added to the base.

d_i = theta_i - theta_base;  v_i = w_i prune(d_i);  m = sum v_i, or the sum over the elected sign;  theta_base + lambda m.
"""

from collections.abc import Callable, Sequence

import torch

from evomerge.weights.tensor_group import TensorGroup

Prune = Callable[[TensorGroup, int, torch.Tensor], torch.Tensor]
"""(group, position of the source, delta) -> pruned delta"""

TINY_SUM = 1e-7
"""below this L1 norm nothing is rescaled, as in mergekit"""


def merge_task_vectors(group: TensorGroup, prune: Prune | None, *, elect_sign: bool) -> torch.Tensor:
    """The family's formula (arXiv 2212.04089, 2306.01708), in the dtype of the inputs.

    Args:
        group: sources with `weight`; shared `lambda` and `normalize`.
        prune: makes deltas sparse, which then get their L1 norm back where `rescale`; None leaves them as they are.
        elect_sign: keep only entries whose sign is that of the weighted sum (TIES).
    """
    base = group.required_base()
    # in the dtype of the arithmetic, as mergekit holds them
    weights = torch.tensor(group.values("weight"), dtype=base.dtype, device=base.device)
    weighted = []
    for position, (tensor, weight) in enumerate(zip(group.tensors, weights, strict=True)):
        delta = tensor - base
        if prune is not None:
            pruned = prune(group, position, delta)
            delta = match_l1(delta, pruned) if group.shared["rescale"] else pruned
        weighted.append(delta * weight)
    total = in_order_sum(weighted)
    if elect_sign:
        elected = torch.where(total >= 0, 1.0, -1.0).to(base.dtype)
        agreeing = [value.sign() == elected for value in weighted]
        kept = [value * agrees for value, agrees in zip(weighted, agreeing, strict=True)]
        total = in_order_sum(kept)
        divisor = in_order_sum([weight * agrees for weight, agrees in zip(weights, agreeing, strict=True)])
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    else:
        divisor = weight_sum(weights)
    if group.shared["normalize"]:
        total = total / divisor
    if group.shared["lambda"] != 1:
        total = total * float(group.shared["lambda"])
    return base + total


def weight_sum(weights: torch.Tensor) -> torch.Tensor:
    """What a normalised sum is divided by; 1 for weights that sum to 0."""
    total = weights.sum()
    return torch.where(total.abs().float() < 1e-8, torch.ones_like(total), total)  # float16 has no 1e-8


def in_order_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, added one after the other in float32 at least and rounded once to their dtype."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor in tensors:
        total += tensor
    return total.to(tensors[0].dtype)


def match_l1(delta: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """`pruned` scaled to the L1 norm of `delta` (mergekit's `rescale`; the DARE paper divides by the density instead)."""
    before, after = delta.abs().sum(dtype=torch.float64), pruned.abs().sum(dtype=torch.float64)
    if before < TINY_SUM or after < TINY_SUM:
        return pruned
    return pruned * (before / after).to(pruned.dtype)


def keep_largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """`delta` with all but its `max(1, int(density n))` largest magnitudes set to 0; of equal ones the first are kept."""
    if density >= 1:
        return delta
    keep = n_largest(delta.numel(), density)
    return torch.where(marked(delta, falling(delta.abs().float())[:keep]), delta, torch.zeros_like(delta))


def n_largest(n_elements: int, density: float) -> int:
    """How many entries are kept."""
    return max(1, int(density * n_elements)) if density > 0 else 0


def falling(values: torch.Tensor) -> torch.Tensor:
    """Flat indices of `values`, the largest first; of equal ones the first in flat order, (elements,) int64."""
    return torch.sort(values.reshape(-1), descending=True, stable=True).indices


def marked(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A boolean mask in the shape of `tensor`, True at flat `indices`."""
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[indices] = True
    return mask.reshape(tensor.shape)
