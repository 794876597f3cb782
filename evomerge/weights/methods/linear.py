"""linear: sum w_i theta_i, divided by sum w_i if `normalize` (model soups, arXiv 2203.05482).

Accumulates in float32 whatever the dtype of the inputs, as mergekit does.
"""

import torch

from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """Weighted sum or average of the sources."""
    weights = torch.tensor(group.values("weight"), dtype=torch.float32, device=group.tensors[0].device)
    total = torch.zeros_like(group.tensors[0], dtype=torch.float32)
    for tensor, weight in zip(group.tensors, weights, strict=True):
        total += tensor.float() * weight
    if group.shared["normalize"]:
        total /= weights.sum()
    return total.to(group.tensors[0].dtype)
