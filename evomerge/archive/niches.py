"""Natural niches (M2N2, arXiv 2508.16204): items are resources that members share, so being alone at solving an item pays.

Arrays only: `scores` is (n_members, n_items) in [0, 1], higher is better. Capacity of an item: the best score on it, which
is 1 for solved binary items and keeps a partly solved item from handing out a full point.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EPSILON = 1e-12


def resource_fitness(scores: ArrayLike, alpha: float = 1.0) -> NDArray[np.float64]:
    """Each member's share of all items, f_i = sum_j s_ij c_j / z_j^alpha with z_j = sum_k s_kj; shape (n_members,).

    `alpha` 1 shares each item's capacity among its solvers, 0 is a plain sum (a genetic algorithm's fitness), above 1
    punishes crowding harder.
    """
    table = np.asarray(scores, dtype=np.float64)
    return np.asarray(table @ _worth(table.max(axis=0), table.sum(axis=0), alpha))


def attraction(scores: ArrayLike, member: int) -> NDArray[np.float64]:
    """How much each other member could teach `member`: g_b = sum_j c_j / z_j max(s_bj - s_aj, 0); (n_members,)."""
    table = np.asarray(scores, dtype=np.float64)
    return _gains(table, member, _worth(table.max(axis=0), table.sum(axis=0), 1.0))


def _worth(capacity: NDArray[np.float64], demand: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """What a score of 1 on each item is worth, c_j / z_j^alpha, (n_items,).

    Where nobody scores, it does not matter and is 0. The paper adds a small number to the divisor instead; without it, sharing
    one item with one other member is worth exactly half of having it alone, as in the released code.
    """
    crowd = demand if alpha == 1.0 else demand**alpha
    return np.asarray(np.divide(capacity, crowd, out=np.zeros(len(demand)), where=demand > 0.0))


def _gains(table: NDArray[np.float64], member: int, worth: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.maximum(table - table[member], 0.0) @ worth)


def coverage(scores: ArrayLike, threshold: float = 0.5) -> float:
    """Share of items that some member scores at least `threshold` on."""
    table = np.asarray(scores, dtype=np.float64)
    return float((table.max(axis=0) >= threshold).mean()) if table.size else 0.0


def solve_rate_entropy(scores: ArrayLike) -> float:
    """Mean binary entropy over items of the members' mean score, in bits: 0 when all members agree on every item."""
    rate = np.clip(np.asarray(scores, dtype=np.float64).mean(axis=0), _EPSILON, 1.0 - _EPSILON)
    return float(np.mean(-rate * np.log2(rate) - (1.0 - rate) * np.log2(1.0 - rate)))


class _Standing(NamedTuple):
    """What follows from the scores of an archive."""

    scores: NDArray[np.float64]
    capacity: NDArray[np.float64]
    demand: NDArray[np.float64]
    fitness: NDArray[np.float64]
    worth: NDArray[np.float64]
    appeals: dict[int, NDArray[np.float64]]
    """by first parent, how much each member adds to it; those asked for so far"""


class Stakes(NamedTuple):
    """What a newcomer plays for, item by item: `lost` says when its evaluation may stop."""

    credit: NDArray[np.float64]
    """(n_members,): its lead in fitness over each member if it scored 1 on every item; infinite where nothing can be said:
    while the archive has room, and where a newcomer may change how items are rescaled"""
    cost: NDArray[np.float64]
    """(n_items, n_members), never negative: what it loses of that lead by scoring 0 on an item"""
    order: NDArray[np.intp]
    """(n_items,): items from the one that fewest members solve on, since failing these costs most"""

    def lost(self, failed: NDArray[np.bool_]) -> bool:
        """Whether `Niches.add` turns the newcomer away even if it scores 1 on all items but those `failed`, (n_items,)."""
        return bool((self.credit - self.cost[failed].sum(axis=0)).max() < -_EPSILON * len(self.cost))


class Niches:
    """The score table of an archive of fixed size: who enters, who leaves, who mates. What the members are, its user knows.

    Item scores of any range may come in. Items whose scores leave [0, 1] within the archive are rescaled there between the
    archive's worst and best; `from_worst` does so for all items, for scores that differ only in a narrow band.

    Args:
        size: members, at least 2.
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
        """Item scores as they came in, (n_members, n_items), by slot; a view."""
        return self._table[: self._n]

    def scores(self) -> NDArray[np.float64]:
        """Item scores as competition sees them, (n_members, n_items) in [0, 1]."""
        return self._graded(self._table[: self._n])

    def fits(self, items: ArrayLike) -> bool:
        """Whether `items` are as many as the other members'."""
        return self._n == 0 or np.shape(items) == self._table.shape[1:]

    def add(self, items: ArrayLike) -> int | None:
        """Lets a newcomer compete: with it in the table, whoever has the smallest share leaves once there are too many.

        Args:
            items: its item scores, (n_items,).

        Returns:
            The slot in [0, size) that the newcomer has from now on; None where it is the weakest itself. Of equally weak
            members the one in the first slot leaves.
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
        """What the next newcomer plays for, if its scores are in [0, 1]; to stop evaluating one that has lost already."""
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
        """Two slots: the first drawn by fitness, the second by what it adds to the first (`attracted`) or by fitness.

        Where no other member adds anything, the second is drawn by fitness; where nobody has any, uniformly. Without attraction
        the released code may draw the same member twice; `distinct` does not.
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
        """Sums over the archive as it is; most newcomers leave it so."""
        if self._standing is None:
            scores = self.scores()
            capacity, demand = scores.max(axis=0), scores.sum(axis=0)
            fitness = scores @ _worth(capacity, demand, self.alpha)
            self._standing = _Standing(scores, capacity, demand, fitness, _worth(capacity, demand, 1.0), {})
        return self._standing

    def _shares_with_newcomer(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Everybody's fitness with the newcomer, who is in the table's last row: (size + 1,)."""
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
    """An index with probability proportional to `weights`, uniform where they are all 0."""
    edges = (weights if weights.any() else np.ones(len(weights))).cumsum()
    return min(int(edges.searchsorted(generator.random() * edges[-1], side="right")), len(weights) - 1)
