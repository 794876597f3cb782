"""task_arithmetic: theta_base + lambda sum w_i (theta_i - theta_base), the sum divided by sum w_i if `normalize` (arXiv 2212.04089)."""

import torch

from evomerge.weights.task_vectors import merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """Weighted sum of the task vectors, added to the base."""
    return merge_task_vectors(group, None, elect_sign=False)
