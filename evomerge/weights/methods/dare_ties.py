"""dare_ties: drop entries of each task vector at random, rescale the rest, then continue as in TIES (arXiv 2311.03099).

Each entry is kept with probability `density`; `rescale` restores the L1 norm (mergekit's choice; the paper divides by the
density). Masks are functions of (seed, tensor, source, element): see `evomerge.weights.philox`.
"""

import torch

from evomerge.weights.philox import keep_mask, mask_key
from evomerge.weights.task_vectors import merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def drop_at_random(group: TensorGroup, position: int, delta: torch.Tensor) -> torch.Tensor:
    """`delta` with every entry kept with probability `density`."""
    density = float(group.parameters[position]["density"])
    if density >= 1:
        return delta
    mask = keep_mask(mask_key(group.seed, group.output, position), delta.shape, density).to(delta.device)
    return torch.where(mask, delta, torch.zeros_like(delta))


def merge(group: TensorGroup) -> torch.Tensor:
    """Randomly dropped task vectors whose signs agree, added to the base."""
    return merge_task_vectors(group, drop_at_random, elect_sign=True)
