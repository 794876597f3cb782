"""`m2n2`: natural niches (arXiv 2508.16204) over recipes: competition for items, attraction, split-point crossover.

Every candidate is a unit vector and its item scores. Parent A is drawn by its share of all items, parent B by what it
could teach A; the child takes a mix of both left of a random split point and the opposite mix right of it. The archive
then drops the member with the smallest share, which may be the child.

Deviations from the paper: it crosses the weights of models (SLERP), this crosses the coordinates of their recipes
(linear), so a descendant of any depth is again one point of the space; and a small mutation is on by default, because
recipes start from a space-filling design and not from models that were trained apart.
"""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evomerge.archive import attraction, resource_fitness
from evomerge.core import VectorGenome, random_stream
from evomerge.strategy.base import Proposal, StrategyOptions, Told, candidate_id
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.sampling import SobolStream


class M2n2Options(StrategyOptions):
    """Options of `m2n2`."""

    population_size: int = Field(
        15,
        ge=2,
        description="archive members; the paper takes 15 for 1000 evaluations of language models, 20 for 50,000 of digits",
    )
    alpha: float = Field(
        1.0, ge=0.0, le=4.0, description="strength of competition; 0 is a plain genetic algorithm (paper: 1)"
    )
    attraction: bool = Field(
        True, description="choose the second parent by what it adds; otherwise by fitness (paper: true)"
    )
    split_point: bool = Field(
        True, description="cross around a random coordinate; otherwise one mix for all (paper: true)"
    )
    mutation_sigma: float = Field(
        0.02, ge=0.0, le=1.0, description="normal noise on every coordinate of a child (paper: 0 with trained models)"
    )


class M2n2(ReplayStrategy):
    """Steady-state search for members that solve items nobody else solves.

    It reads item scores; where an evaluation has none, the objectives themselves are the items. Scores outside [0, 1] are
    rescaled per item over the archive. FAILED and INFEASIBLE candidates, and those scored on another number of items than
    the rest (racing), never enter the archive. Seeds are its first members, then Sobol points fill it.
    """

    name: ClassVar[str] = "m2n2"
    options_type: ClassVar[type[StrategyOptions]] = M2n2Options
    needs_items: ClassVar[bool] = True
    options: M2n2Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generator = random_stream(self.random_seed, "m2n2", "mating")
        self._initial = SobolStream(self.dimension, random_stream(self.random_seed, "m2n2", "sobol"))
        self._sobol_pending: set[str] = set()
        self._members: list[Told] = []
        self._items = np.empty((0, 0))

    @property
    def archive(self) -> tuple[tuple[str, NDArray[np.float64]], ...]:
        """The members: candidate id and item scores (n_items,), higher is better."""
        return tuple((told.candidate.id, row.copy()) for told, row in zip(self._members, self._items, strict=True))

    def _propose(self) -> Proposal:
        if len(self._members) + len(self._sobol_pending) < self.options.population_size or len(self._members) < 2:
            self._sobol_pending.add(candidate_id(self._n_asked + 1))
            return Proposal(self._initial.next())
        scores = self._scores()
        fitness = resource_fitness(scores, self.options.alpha)
        first = self._draw(fitness)
        appeal = attraction(scores, first) if self.options.attraction else np.zeros(len(fitness))
        if appeal.sum() <= 0.0:
            appeal = fitness.copy()
            appeal[first] = 0.0
        second = self._draw(appeal, other_than=first)
        parents = [self._members[row].candidate for row in (first, second)]
        return Proposal(self._cross(parents[0].genome, parents[1].genome), tuple(parent.id for parent in parents))

    def _learn(self, told: Told) -> None:
        self._sobol_pending.discard(told.candidate.id)
        if told.losses is None:
            return
        items = np.asarray(told.items if told.items is not None else [-loss for loss in told.losses], dtype=np.float64)
        if self._members and items.shape != self._items.shape[1:]:
            return
        self._items = np.vstack([self._items, items]) if self._members else items[None]
        self._members.append(told)
        if len(self._members) > self.options.population_size:
            leaves = int(np.argmin(resource_fitness(self._scores(), self.options.alpha)))
            del self._members[leaves]
            self._items = np.delete(self._items, leaves, axis=0)

    def _scores(self) -> NDArray[np.float64]:
        """The item table in [0, 1]; items with values outside are rescaled between the archive's worst and best."""
        low, high = self._items.min(axis=0), self._items.max(axis=0)
        foreign = (low < 0.0) | (high > 1.0)
        spread = np.where(high > low, high - low, 1.0)
        return np.where(foreign, (self._items - low) / spread, self._items)

    def _draw(self, weights: NDArray[np.float64], other_than: int | None = None) -> int:
        """An index with probability proportional to `weights`, uniform where they are all 0."""
        if weights.sum() <= 0.0:
            weights = np.ones(len(weights))
            if other_than is not None:
                weights[other_than] = 0.0
        edges = np.cumsum(weights)
        return min(int(np.searchsorted(edges, self._generator.random() * edges[-1], side="right")), len(weights) - 1)

    def _cross(self, first: VectorGenome, second: VectorGenome) -> VectorGenome:
        mix = self._generator.random()
        split = int(self._generator.integers(self.dimension)) if self.options.split_point else 0
        share = np.where(np.arange(self.dimension) < split, mix, 1.0 - mix)
        child = (1.0 - share) * np.array(first.values) + share * np.array(second.values)
        if self.options.mutation_sigma > 0.0:
            child = child + self.options.mutation_sigma * self._generator.standard_normal(self.dimension)
        return VectorGenome(tuple(np.clip(child, 0.0, 1.0).tolist()))
