"""ram: entries changed by one expert keep its change; entries changed by several take the mean of their changes (arXiv 2601.13572).

An entry is changed if |d| > epsilon.
"""

import torch

from evomerge.weights.task_vectors import in_order_sum
from evomerge.weights.tensor_group import TensorGroup


def changes(group: TensorGroup) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Task vectors, masks of their changed entries, and the number of experts that change each entry."""
    base = group.required_base()
    deltas = [tensor - base for tensor in group.tensors]
    changed = [delta.abs() > float(group.shared["epsilon"]) for delta in deltas]
    return deltas, changed, torch.stack(changed).sum(dim=0, dtype=torch.int32)


def merge(group: TensorGroup) -> torch.Tensor:
    """For each entry, the mean over the experts that changed it, added to the base."""
    deltas, changed, count = changes(group)
    shared = count.clamp(min=1)
    parts = [delta * active / shared for delta, active in zip(deltas, changed, strict=True)]
    return group.required_base() + in_order_sum(parts)
