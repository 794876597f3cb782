"""dare_linear: drop entries of each task vector at random, rescale the rest, and sum them (arXiv 2311.03099). Masks as in dare_ties."""

import torch

from evomerge.weights.methods.dare_ties import drop_at_random
from evomerge.weights.task_vectors import merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """Weighted sum of the randomly dropped task vectors, added to the base."""
    return merge_task_vectors(group, drop_at_random, elect_sign=False)
