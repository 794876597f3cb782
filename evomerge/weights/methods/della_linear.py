"""della_linear: task vectors pruned by rank as in della, summed without sign consensus (arXiv 2406.11617)."""

import torch

from evomerge.weights.methods.della import drop_by_rank
from evomerge.weights.task_vectors import merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """Weighted sum of the pruned task vectors, added to the base."""
    return merge_task_vectors(group, drop_by_rank, elect_sign=False)
