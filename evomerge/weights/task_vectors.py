"""The common part of the task-vector methods: pruned deltas are weighted, optionally elect a sign, and are summed, scaled and added to the base.

d_i = theta_i - theta_base;  v_i = w_i prune(d_i);  m = sum v_i, or the sum over the elected sign;  theta_base + lambda m.
"""

from collections.abc import Callable, Sequence

import torch

from evomerge.weights.tensor_group import TensorGroup

Prune = Callable[[TensorGroup, int, torch.Tensor], torch.Tensor]
"""(group, position of the source, delta) -> pruned delta"""

TINY_SUM = 1e-7
"""vectors with a smaller L1 norm are not rescaled, as in mergekit"""


def merge_task_vectors(group: TensorGroup, prune: Prune | None, *, elect_sign: bool) -> torch.Tensor:
    """The family's formula (arXiv 2212.04089, 2306.01708), in the dtype of the inputs.

    Args:
        group: sources with `weight`; shared `lambda` and `normalize`.
        prune: prunes deltas, which are then rescaled to their original L1 norm if `rescale`; None = no pruning.
        elect_sign: keep only entries with the sign of the weighted sum (TIES).
    """
    base = group.required_base()
    # in the dtype of the arithmetic, as in mergekit
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
    """The divisor of a normalised sum; 1 for weights that sum to 0."""
    total = weights.sum()
    return torch.where(total.abs().float() < 1e-8, torch.ones_like(total), total)  # float16 cannot represent 1e-8


def in_order_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, accumulated in order in float32 at least and rounded once to the tensors' dtype."""
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
    """`delta` with all but its `n_largest` largest magnitudes set to 0; of equal ones, the first are kept."""
    if density >= 1:
        return delta
    keep = n_largest(delta.numel(), density)
    return torch.where(marked(delta, falling(delta.abs().float())[:keep]), delta, torch.zeros_like(delta))


def n_largest(n_elements: int, density: float) -> int:
    """Number of entries kept: `max(1, int(density n))`, or 0 if `density` is 0."""
    return max(1, int(density * n_elements)) if density > 0 else 0


def falling(values: torch.Tensor) -> torch.Tensor:
    """Flat indices (elements,) int64 that sort `values` in descending order; equal ones stay in flat order."""
    return torch.sort(values.reshape(-1), descending=True, stable=True).indices


def marked(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A boolean mask in the shape of `tensor`, True at flat `indices`."""
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[indices] = True
    return mask.reshape(tensor.shape)
