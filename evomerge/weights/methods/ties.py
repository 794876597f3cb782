"""ties: keep each task vector's largest entries, elect a sign per element, and sum the entries that agree (arXiv 2306.01708).

Pruning keeps k = max(1, int(density n)) entries of each tensor (none if density is 0); of equal magnitudes at the threshold, the first ones.
The elected sign is that of the weighted sum (+ if it is 0); entries that are 0 never agree.
"""

import torch

from evomerge.weights.task_vectors import keep_largest, merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def _prune(group: TensorGroup, position: int, delta: torch.Tensor) -> torch.Tensor:
    return keep_largest(delta, float(group.parameters[position]["density"]))


def merge(group: TensorGroup) -> torch.Tensor:
    """Pruned task vectors whose signs agree, added to the base."""
    return merge_task_vectors(group, _prune, elect_sign=True)
