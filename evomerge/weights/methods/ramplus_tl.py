"""ramplus_tl: as ram, with the changes of one expert alone enlarged (arXiv 2601.13572, tensor-local form).

They are multiplied by 1 + r clip(#shared / max(#unique, epsilon), 0, alpha), counted per expert and tensor. This factor and what it is
applied to, and so sum and result, are float32 in lower precision too: rounded to bfloat16, most factors would be 1.
"""

import torch

from evomerge.weights.methods.ram import changes
from evomerge.weights.task_vectors import in_order_sum
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """Changes of several experts averaged, changes of one enlarged, added to the base."""
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
    """What an expert's own changes are multiplied by, of which it has `n_unique` beside `n_shared` that others made too."""
    # without entries of its own there is nothing to enlarge, and with epsilon 0 nothing to divide by
    share = n_shared / max(n_unique, epsilon) if n_unique else 0.0
    return 1 + r * min(share, alpha)
