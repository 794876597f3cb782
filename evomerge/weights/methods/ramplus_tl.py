"""ramplus_tl: like ram, with changes made by a single expert amplified (arXiv 2601.13572, tensor-local form).

They are multiplied by 1 + r clip(#shared / max(#unique, epsilon), 0, alpha), counted per expert and tensor. This factor and its operands,
and hence sum and result, are float32 even in lower precision: rounded to bfloat16, most factors would be 1.
"""

import torch

from evomerge.weights.methods.ram import changes
from evomerge.weights.task_vectors import in_order_sum
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """Averaged changes of several experts and amplified changes of single ones, added to the base."""
    deltas, changed, count = changes(group)
    r, alpha, epsilon = (float(group.shared[name]) for name in ("r", "alpha", "epsilon"))
    parts = []
    for delta, active in zip(deltas, changed, strict=True):
        n_unique, n_shared = int((active & (count == 1)).sum()), int((active & (count > 1)).sum())
        factor = own_factor(n_unique, n_shared, r, alpha, epsilon)
        change = delta * active
        parts.append(torch.where(count > 1, (change / count.clamp(min=1)).float(), change.float() * factor))
    return group.required_base() + in_order_sum(parts)


def own_factor(n_unique: int, n_shared: int, r: float, alpha: float, epsilon: float) -> float:
    """The factor of the `n_unique` changes that an expert makes alone, given the `n_shared` ones that others make too."""
    # without unique changes there is nothing to amplify, and with epsilon 0 this would divide by 0
    share = n_shared / max(n_unique, epsilon) if n_unique else 0.0
    return 1 + r * min(share, alpha)
