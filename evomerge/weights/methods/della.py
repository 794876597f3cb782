"""della: drop entries of each task vector at random, small ones more often, then as TIES (arXiv 2406.11617).

In each row (a vector is one row) the entry of rank r of n by magnitude, from 0 for the smallest, is kept with probability
`density - epsilon + 2 epsilon r / (n - 1)`; `density` in a row of one entry, where mergekit divides 0 by 0. `rescale`
restores the L1 norm. Random numbers as in dare_ties. density +- epsilon must lie inside (0, 1).
"""

import numpy as np
import torch

from evomerge.weights.philox import DECISIONS, mask_key, random_halves
from evomerge.weights.task_vectors import merge_task_vectors
from evomerge.weights.tensor_group import TensorGroup


def last_kept(n_columns: int, density: float, epsilon: float) -> tuple[float, float]:
    """The largest of the 2^16 random numbers that keeps the smallest entry of a row, before it is cut off to an integer, and its rise by rank.

    Never below 0, so that every entry can be kept. In float32, as is what is computed from them: with steps of 2^-24 of the
    range every device finds the same.
    """
    low, rise = (density, 0.0) if n_columns < 2 else (density - epsilon, 2 * epsilon / (n_columns - 1))
    return max(float(np.float32(low * DECISIONS - 0.5)), 0.0), float(np.float32(rise * DECISIONS))


def drop_by_rank(group: TensorGroup, position: int, delta: torch.Tensor) -> torch.Tensor:
    """`delta` with entries dropped with a probability that falls with their rank in the row."""
    parameters = group.parameters[position]
    density, epsilon = float(parameters["density"]), float(parameters["epsilon"])
    if density >= 1 or delta.numel() == 0:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    rows = delta.reshape(1, -1) if delta.dim() < 2 else delta.reshape(-1, delta.shape[-1])
    order = torch.sort(rows.abs().float(), dim=1, stable=True).indices.cpu()
    low, rise = last_kept(rows.shape[1], density, epsilon)
    by_rank = (low + torch.arange(rows.shape[1], dtype=torch.float32) * rise).int()
    by_entry = torch.empty(rows.shape, dtype=torch.int32)
    by_entry.scatter_(1, order, by_rank.expand(rows.shape).contiguous())
    halves = random_halves(mask_key(group.seed, group.output, position), 0, delta.numel()).astype(np.int32)
    mask = (torch.from_numpy(halves) <= by_entry.reshape(-1)).reshape(delta.shape)
    return torch.where(mask.to(delta.device), delta, torch.zeros_like(delta))


def merge(group: TensorGroup) -> torch.Tensor:
    """Task vectors thinned out by rank whose signs agree, added to the base."""
    return merge_task_vectors(group, drop_by_rank, elect_sign=True)
