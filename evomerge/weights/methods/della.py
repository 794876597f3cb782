"""della: drop entries of each task vector at random, small ones more often, then continue as in TIES (arXiv 2406.11617).

In each row (a vector is one row) the entry of rank r of n by magnitude, from 0 for the smallest, is kept with probability
`density - epsilon + 2 epsilon r / (n - 1)`; with `density` in a row of one entry, where mergekit divides 0 by 0. `rescale`
restores the L1 norm. Random numbers are as in dare_ties. density +- epsilon must be inside (0, 1).
"""

import numpy as np
import torch

from evomerge.weights.philox import DECISIONS, keep_threshold, mask_key, random_halves
from evomerge.weights.task_vectors import merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def keep_by_rank(n_columns: int, density: float, epsilon: float) -> tuple[int, float]:
    """(keep, step): how many of the 2^16 random numbers, from 0 on, keep the smallest entry of a row, and how many more each rank adds (float32).

    An entry of rank r is kept by `keep + int(step r)` numbers, which matches its probability to within 2^-16, but by at least one. The product
    is rounded to float32, so that it is the same on every device.
    """
    if n_columns < 2:
        return keep_threshold(density), 0.0
    keep = max(round((density - epsilon) * DECISIONS + 0.5), 1)
    return keep, float(np.float32(min(2 * epsilon * DECISIONS, DECISIONS - 1) / (n_columns - 1)))


def drop_by_rank(group: TensorGroup, position: int, delta: torch.Tensor) -> torch.Tensor:
    """`delta` with entries dropped with a probability that decreases with their rank in the row."""
    parameters = group.parameters[position]
    density, epsilon = float(parameters["density"]), float(parameters["epsilon"])
    if density >= 1 or delta.numel() == 0:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    rows = delta.reshape(1, -1) if delta.dim() < 2 else delta.reshape(-1, delta.shape[-1])
    order = torch.sort(rows.abs().float(), dim=1, stable=True).indices.cpu()
    keep, step = keep_by_rank(rows.shape[1], density, epsilon)
    by_rank = keep + (torch.arange(rows.shape[1], dtype=torch.float32) * step).int()
    by_entry = torch.empty(rows.shape, dtype=torch.int32)
    by_entry.scatter_(1, order, by_rank.expand(rows.shape).contiguous())
    halves = random_halves(mask_key(group.seed, group.output, position), 0, delta.numel()).astype(np.int32)
    mask = (torch.from_numpy(halves) < by_entry.reshape(-1)).reshape(delta.shape)
    return torch.where(mask.to(delta.device), delta, torch.zeros_like(delta))


def merge(group: TensorGroup) -> torch.Tensor:
    """Entries of the task vectors, pruned by rank, whose signs agree, added to the base."""
    return merge_task_vectors(group, drop_by_rank, elect_sign=True)
