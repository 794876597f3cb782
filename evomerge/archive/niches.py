"""Natural niches (M2N2, arXiv 2508.16204): items are resources that members share, so being alone at solving an item pays.

Arrays only: `scores` is (n_members, n_items) in [0, 1], higher is better. Capacity of an item: the best score on it, which
is 1 for solved binary items and keeps a partly solved item from handing out a full point.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EPSILON = 1e-12


def resource_fitness(scores: ArrayLike, alpha: float = 1.0) -> NDArray[np.float64]:
    """Each member's share of all items, f_i = sum_j s_ij c_j / (z_j^alpha + eps), z_j = sum_k s_kj; shape (n_members,).

    `alpha` 1 shares each item's capacity among its solvers, 0 is a plain sum (a genetic algorithm's fitness), above 1
    punishes crowding harder.
    """
    table = np.asarray(scores, dtype=np.float64)
    demand = table.sum(axis=0)
    return np.asarray((table * (table.max(axis=0) / (demand**alpha + _EPSILON))).sum(axis=1))


def attraction(scores: ArrayLike, member: int) -> NDArray[np.float64]:
    """How much each other member could teach `member`: g_b = sum_j c_j / (z_j + eps) max(s_bj - s_aj, 0); (n_members,)."""
    table = np.asarray(scores, dtype=np.float64)
    value = table.max(axis=0) / (table.sum(axis=0) + _EPSILON)
    gains = np.maximum(table - table[member], 0.0) @ value
    gains[member] = 0.0
    return np.asarray(gains)


def coverage(scores: ArrayLike, threshold: float = 0.5) -> float:
    """Share of items that some member scores at least `threshold` on."""
    table = np.asarray(scores, dtype=np.float64)
    return float((table.max(axis=0) >= threshold).mean()) if table.size else 0.0


def solve_rate_entropy(scores: ArrayLike) -> float:
    """Mean binary entropy over items of the members' mean score, in bits: 0 when all members agree on every item."""
    rate = np.clip(np.asarray(scores, dtype=np.float64).mean(axis=0), _EPSILON, 1.0 - _EPSILON)
    return float(np.mean(-rate * np.log2(rate) - (1.0 - rate) * np.log2(1.0 - rate)))
