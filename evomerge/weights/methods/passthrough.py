"""passthrough: the source itself, times `scale`. With slices, it stacks layers ("frankenmerging")."""

import torch

from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """The scaled source."""
    return group.tensors[0] * float(group.parameters[0]["scale"])
