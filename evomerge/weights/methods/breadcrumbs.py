"""breadcrumbs: drop the largest (outliers) and smallest entries of each task vector, and sum the rest (arXiv 2312.06795).

`gamma` is the fraction of the largest entries to drop, `density` the fraction to keep; if their sum exceeds 1, fewer outliers
are dropped. Of equal magnitudes, the first in flat order count as larger.
"""

import torch

from evomerge.weights.task_vectors import falling, marked, merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def band(n_elements: int, density: float, gamma: float) -> tuple[int, int]:
    """The number of largest entries that are dropped, and of next largest ones that are kept."""
    keep = int(density * n_elements)
    smallest = max(0, n_elements - keep - int(gamma * n_elements))
    return n_elements - keep - smallest, keep


def drop_outliers(group: TensorGroup, position: int, delta: torch.Tensor) -> torch.Tensor:
    """`delta` without its largest and smallest entries."""
    parameters = group.parameters[position]
    density, gamma = float(parameters["density"]), float(parameters["gamma"])
    if density >= 1:
        return delta
    dropped, keep = band(delta.numel(), density, gamma)
    mask = marked(delta, falling(delta.abs().float())[dropped : dropped + keep])
    return torch.where(mask, delta, torch.zeros_like(delta))


def merge(group: TensorGroup) -> torch.Tensor:
    """Weighted sum of the task vectors' middle magnitudes, added to the base."""
    return merge_task_vectors(group, drop_outliers, elect_sign=False)
