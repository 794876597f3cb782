"""shifted_linear: sum w_i theta_i + shift.

Needed to fold a scale into a norm that computes with 1 + w: (1 + w) / s = 1 + (w / s + 1 / s - 1).
"""

import torch

from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """The weighted sum in float32, plus the shift."""
    total = torch.full_like(group.tensors[0], float(group.shared["shift"]), dtype=torch.float32)
    for tensor, weight in zip(group.tensors, group.values("weight"), strict=True):
        total += tensor.float() * weight
    return total.to(group.tensors[0].dtype)
