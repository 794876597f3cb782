"""Natural niches (M2N2, arXiv 2508.16204): items are resources that members share, so solving an item that few others solve pays.

Works on arrays: `scores` is (n_members, n_items) in [0, 1], higher is better. The capacity of an item is the best score on it:
1 for solved binary items, and less for an item that is only partly solved.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EPSILON = 1e-12


def resource_fitness(scores: ArrayLike, alpha: float = 1.0) -> NDArray[np.float64]:
    """Each member's share of all items, f_i = sum_j s_ij c_j / z_j^alpha with z_j = sum_k s_kj; shape (n_members,).

    `alpha` 1 shares each item's capacity among its solvers, 0 is a plain sum (the fitness of a plain genetic algorithm),
    values above 1 penalise crowding more.
    """
    table = np.asarray(scores, dtype=np.float64)
    return np.asarray(table @ _worth(table.max(axis=0), table.sum(axis=0), alpha))


def attraction(scores: ArrayLike, member: int) -> NDArray[np.float64]:
    """How much each member b could add to `member` a: g_b = sum_j c_j / z_j max(s_bj - s_aj, 0); (n_members,)."""
    table = np.asarray(scores, dtype=np.float64)
    return _gains(table, member, _worth(table.max(axis=0), table.sum(axis=0), 1.0))


def _worth(capacity: NDArray[np.float64], demand: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """The worth of a score of 1 on each item, c_j / z_j^alpha, (n_items,).

    For items that nobody scores on, it does not matter and is 0. The paper adds a small number to the divisor instead; without it, sharing
    an item with one other member is worth exactly half of solving it alone, as in the released code.
    """
    crowd = demand if alpha == 1.0 else demand**alpha
    return np.asarray(np.divide(capacity, crowd, out=np.zeros(len(demand)), where=demand > 0.0))


def _gains(table: NDArray[np.float64], member: int, worth: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.maximum(table - table[member], 0.0) @ worth)


def coverage(scores: ArrayLike, threshold: float = 0.5) -> float:
    """The share of items on which at least one member scores `threshold` or more."""
    table = np.asarray(scores, dtype=np.float64)
    return float((table.max(axis=0) >= threshold).mean()) if table.size else 0.0


def solve_rate_entropy(scores: ArrayLike) -> float:
    """Mean over items of the binary entropy of the members' mean score, in bits; 0 if on every item all members score 0 or all score 1."""
    rate = np.clip(np.asarray(scores, dtype=np.float64).mean(axis=0), _EPSILON, 1.0 - _EPSILON)
    return float(np.mean(-rate * np.log2(rate) - (1.0 - rate) * np.log2(1.0 - rate)))


class _Standing(NamedTuple):
    """Quantities computed from the scores of an archive."""

    scores: NDArray[np.float64]
    capacity: NDArray[np.float64]
    demand: NDArray[np.float64]
    fitness: NDArray[np.float64]
    worth: NDArray[np.float64]
    appeals: dict[int, NDArray[np.float64]]
    """first parent -> how much each member adds to it; filled on demand"""


class Stakes(NamedTuple):
    """What a newcomer can gain and lose on each item; `lost` tells when its evaluation may stop early."""

    credit: NDArray[np.float64]
    """(n_members,): its lead in fitness over each member if it scored 1 on every item; infinite if it cannot be known:
    while the archive has room, and if a newcomer may change how items are rescaled"""
    cost: NDArray[np.float64]
    """(n_items, n_members), never negative: how much of that lead it loses by scoring 0 on an item"""
    order: NDArray[np.intp]
    """(n_items,): items in ascending order of the members' total score, since failing rarely solved ones costs most"""

    def lost(self, failed: NDArray[np.bool_]) -> bool:
        """Whether `Niches.add` rejects the newcomer even if it scores 1 on all items except those `failed`, (n_items,)."""
        return bool((self.credit - self.cost[failed].sum(axis=0)).max() < -_EPSILON * len(self.cost))


class Niches:
    """The score table of an archive of fixed size: decides which members enter, leave and mate. The caller stores the members themselves.

    Item scores may have any range. Items with scores of members outside [0, 1] are rescaled between the archive's worst and best score;
    `from_worst` subtracts the worst score of all items, for scores that differ only within a narrow band.

    Args:
        size: maximum number of members, at least 2.
        alpha: strength of competition; 0 is a plain genetic algorithm.
        from_worst: subtract the archive's worst score of each item first (the paper does so for image similarity).
    """

    def __init__(self, size: int, alpha: float = 1.0, *, from_worst: bool = False) -> None:
        self.size = size
        self.alpha = alpha
        self._from_worst = from_worst
        self._table = np.empty((0, 0))
        self._n = 0
        self._in_unit_range = True
        self._standing: _Standing | None = None
        self._stakes: Stakes | None = None

    def __len__(self) -> int:
        return self._n

    @property
    def items(self) -> NDArray[np.float64]:
        """Item scores as added, (n_members, n_items), by slot; a view."""
        return self._table[: self._n]

    def scores(self) -> NDArray[np.float64]:
        """Rescaled item scores, which competition is based on, (n_members, n_items) in [0, 1]."""
        return self._graded(self._table[: self._n])

    def fits(self, items: ArrayLike) -> bool:
        """Whether the number of `items` is that of the other members."""
        return self._n == 0 or np.shape(items) == self._table.shape[1:]

    def add(self, items: ArrayLike) -> int | None:
        """Let a newcomer compete: if the archive is full, the member with the lowest fitness leaves, or the newcomer itself.

        Args:
            items: its item scores, (n_items,).

        Returns:
            The newcomer's slot in [0, size); None if it is the weakest itself. Of equally weak members the one in the
            first slot leaves.
        """
        row = np.asarray(items, dtype=np.float64)
        if self._n == 0:
            self._table = np.empty((self.size + 1, len(row)))
        self._table[self._n] = row
        self._in_unit_range = self._in_unit_range and bool(row.min() >= 0.0 and row.max() <= 1.0)
        if self._n < self.size:
            self._n += 1
            self._standing = self._stakes = None
            return self._n - 1
        weakest = int(np.argmin(self._shares_with_newcomer(row)))
        if weakest == self.size:
            return None
        self._table[weakest] = row
        self._standing = self._stakes = None
        return weakest

    def stakes(self) -> Stakes:
        """The stakes of the next newcomer, whose scores must be in [0, 1]; used to stop evaluating one that cannot enter any more."""
        if self._stakes is None:
            now = self._current()
            solved, failed = (
                _worth(np.ones_like(now.demand), now.demand + 1.0, self.alpha),
                _worth(now.capacity, now.demand, self.alpha),
            )
            known = self._n == self.size and self._in_unit_range and not self._from_worst
            credit = solved.sum() - now.scores @ solved if known else np.full(self._n, np.inf)
            cost = solved[:, None] + now.scores.T * (failed - solved)[:, None]
            self._stakes = Stakes(credit, cost, np.argsort(now.demand, kind="stable"))
        return self._stakes

    def parents(
        self, generator: np.random.Generator, *, attracted: bool = True, distinct: bool = True
    ) -> tuple[int, int]:
        """Draw two slots: the first by fitness, the second by what it adds to the first (`attracted`) or by fitness.

        If no other member adds anything, the second is drawn by fitness; if nobody has any, uniformly. Without attraction
        the released code may draw the same member twice; with `distinct` this cannot happen.
        """
        standing = self._current()
        first = _draw(standing.fitness, generator)
        appeal = self._appeal(first) if attracted else np.zeros(self._n)
        if appeal.sum() <= 0.0:
            appeal = standing.fitness.copy()
            if distinct:
                appeal[first] = 0.0
                if appeal.sum() <= 0.0:
                    appeal[:] = 1.0
                    appeal[first] = 0.0
        return first, _draw(appeal, generator)

    def _appeal(self, first: int) -> NDArray[np.float64]:
        standing = self._current()
        if first not in standing.appeals:
            standing.appeals[first] = _gains(standing.scores, first, standing.worth)
        return standing.appeals[first]

    def _current(self) -> "_Standing":
        """Quantities of the current archive; cached, since most newcomers do not change it."""
        if self._standing is None:
            scores = self.scores()
            capacity, demand = scores.max(axis=0), scores.sum(axis=0)
            fitness = scores @ _worth(capacity, demand, self.alpha)
            self._standing = _Standing(scores, capacity, demand, fitness, _worth(capacity, demand, 1.0), {})
        return self._standing

    def _shares_with_newcomer(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """The fitness of all members and the newcomer, which is in the table's last row: (size + 1,)."""
        if not self._in_unit_range or self._from_worst:
            return resource_fitness(self._graded(self._table), self.alpha)
        now = self._current()
        return np.asarray(self._table @ _worth(np.maximum(now.capacity, row), now.demand + row, self.alpha))

    def _graded(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._in_unit_range and not self._from_worst:
            return table
        low, high = table.min(axis=0), table.max(axis=0)
        foreign = (low < 0.0) | (high > 1.0)
        spread = np.where(foreign & (high > low), high - low, 1.0)
        lowest = low if self._from_worst else np.where(foreign, low, 0.0)
        return np.asarray((table - lowest) / spread)


def _draw(weights: NDArray[np.float64], generator: np.random.Generator) -> int:
    """Draw an index with probability proportional to `weights`; uniformly if they are all 0."""
    edges = (weights if weights.any() else np.ones(len(weights))).cumsum()
    return min(int(edges.searchsorted(generator.random() * edges[-1], side="right")), len(weights) - 1)
