"""breadcrumbs_ties: task vectors without outliers and small entries, merged by sign consensus (arXiv 2312.06795, 2306.01708)."""

import torch

from evomerge.weights.methods.breadcrumbs import drop_outliers
from evomerge.weights.task_vectors import merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """The task vectors' middle magnitudes whose signs agree, added to the base."""
    return merge_task_vectors(group, drop_outliers, elect_sign=True)
