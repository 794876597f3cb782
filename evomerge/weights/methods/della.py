"""della: drop entries of each task vector at random, small ones more often, then as TIES (arXiv 2406.11617).

In each row (a vector is one row) the entry of rank r of n by magnitude, from 0 for the smallest, is kept with probability
`density - epsilon + 2 epsilon r / (n - 1)`; `density` in a row of one entry, where mergekit divides 0 by 0. `rescale`
restores the L1 norm. Random words as in dare_ties. density +- epsilon must lie inside (0, 1).
"""

import numpy as np
import torch

from evomerge.weights.philox import mask_key, random_words
from evomerge.weights.task_vectors import match_l1, merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def probabilities(n_columns: int, density: float, epsilon: float) -> tuple[float, float]:
    """With which probability the smallest entry of a row is kept, and how much more likely each larger one is.

    In float32, as is what is computed from them: with steps of 2^-24 every device finds the same.
    """
    if n_columns < 2:
        return float(np.float32(density)), 0.0
    return float(np.float32(density - epsilon)), float(np.float32(2 * epsilon / (n_columns - 1)))


def drop_by_rank(group: TensorGroup, position: int, delta: torch.Tensor) -> torch.Tensor:
    """`delta` with entries dropped with a probability that falls with their rank in the row, rescaled where asked for."""
    parameters = group.parameters[position]
    density, epsilon = float(parameters["density"]), float(parameters["epsilon"])
    if density >= 1 or delta.numel() == 0:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    rows = delta.reshape(1, -1) if delta.dim() < 2 else delta.reshape(-1, delta.shape[-1])
    order = torch.sort(rows.abs().float(), dim=1, stable=True).indices.cpu()
    low, step = probabilities(rows.shape[1], density, epsilon)
    by_rank = (low + torch.arange(rows.shape[1], dtype=torch.float32) * step).double() * 2**32
    by_entry = torch.empty(rows.shape, dtype=torch.float64)
    by_entry.scatter_(1, order, by_rank.floor().expand(rows.shape).contiguous())
    words = random_words(mask_key(group.seed, group.output, position), 0, delta.numel()).astype("float64")
    mask = (torch.from_numpy(words) < by_entry.reshape(-1)).reshape(delta.shape)
    pruned = torch.where(mask.to(delta.device), delta, torch.zeros_like(delta))
    return match_l1(delta, pruned) if group.shared["rescale"] else pruned


def merge(group: TensorGroup) -> torch.Tensor:
    """Task vectors thinned out by rank whose signs agree, added to the base."""
    return merge_task_vectors(group, drop_by_rank, elect_sign=True)
