"""`m2n2`: natural niches (arXiv 2508.16204): competition for items, attraction, split-point crossover of models.

The archive is a score table (`evomerge.archive.Niches`). Parent A is drawn by its share of all items, parent B by what it
adds to A. A child takes a share `mix` of B left of a split point and 1 - `mix` right of it; the archive then drops the
member with the smallest share, which may be the child.

`on: weights` is the published search: models are crossed (SLERP along the flattened weights). This module only decides which
models are crossed, where and how far; a point of its space is one weight per seed model, so the seeds are the unit vectors.
`on: recipes` crosses the coordinates of recipes instead (linearly; choices come from one parent), so it works in any space. It
starts from a space-filling design and needs a small mutation, unlike trained seed models.
"""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from evomerge.archive import Niches
from evomerge.core import (
    Candidate,
    ConfigError,
    CrossoverGenome,
    Mutation,
    VectorGenome,
    random_stream,
)
from evomerge.strategy.base import Proposal, StrategyOptions, Told
from evomerge.strategy.inheritance import inherited_choices
from evomerge.strategy.replay import FEW_KNOWN, ReplayStrategy
from evomerge.strategy.sampling import SobolStream

_RECIPE_SIGMA = 0.02


class M2n2Options(StrategyOptions):
    """Options of `m2n2`."""

    on: Literal["weights", "recipes"] = Field(
        "weights", description="what is crossed: the models' weights (paper), or coordinates of merge recipes"
    )
    population_size: int = Field(
        15,
        ge=2,
        description="archive members; the paper uses 15 for 1000 evaluations of language models, and 20 for 50,000 of digits",
    )
    alpha: float = Field(
        1.0, ge=0.0, le=4.0, description="strength of competition; 0 is a plain genetic algorithm (paper: 1)"
    )
    attraction: bool = Field(
        True, description="choose the second parent by what it adds to the first; otherwise by fitness (paper: true)"
    )
    split_point: bool = Field(
        True, description="cross at a random split point; otherwise with one mix for everything (paper: true)"
    )
    chromosomes: int = Field(
        1,
        ge=1,
        le=64,
        description="groups of weights, each with its own split point; a search takes them from space.module_groups",
    )
    warm_up: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="random merges of two seed models before selection starts; default: enough to fill the archive (paper: at most 50)",
    )
    mutation_sigma: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="normal noise on a child; default: none on weights (paper, with trained seeds), 0.02 on recipes",
    )
    from_worst: bool = Field(
        False, description="measure item scores from the archive's worst (paper: for scores in a narrow band)"
    )


class M2n2(ReplayStrategy):
    """Steady-state search for members that solve items which no other member solves.

    It uses item scores; if an evaluation has none, the objectives themselves are the items. Scores outside [0, 1] are
    rescaled per item over the archive. FAILED and INFEASIBLE candidates, and those scored on a different number of items than
    the rest (racing), never enter the archive. Seeds are its first members. On weights, seed models that were not given as seeds
    are proposed first; on recipes, Sobol points fill the archive.
    """

    name: ClassVar[str] = "m2n2"
    options_type: ClassVar[type[StrategyOptions]] = M2n2Options
    needs_items: ClassVar[bool] = True
    options: M2n2Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_weights = self.options.on == "weights"
        self.max_known = 0 if self._on_weights else FEW_KNOWN
        if self._on_weights and self.dimension < 2:
            raise ConfigError("strategy m2n2 crosses models, so it needs at least two of them; add experts")
        if not self._on_weights and self.options.chromosomes > 1:
            raise ConfigError(
                "strategy m2n2: chromosomes are groups of weights; leave `chromosomes` out with on: recipes"
            )
        sigma = self.options.mutation_sigma
        self._sigma = sigma if sigma is not None else 0.0 if self._on_weights else _RECIPE_SIGMA
        self._generator = random_stream(self.random_seed, "m2n2", "mating")
        self._initial = SobolStream(self.dimension, random_stream(self.random_seed, "m2n2", "sobol"))
        self._filling: set[str] = set()
        self._niches = Niches(self.options.population_size, self.options.alpha, from_worst=self.options.from_worst)
        self._members: list[Candidate] = []
        self._seed_models: dict[int, str] = {}
        self._failed_seeds: set[int] = set()
        self._n_warmed_up = 0

    @property
    def archive(self) -> tuple[tuple[str, np.ndarray], ...]:
        """The members: candidate id and item scores (n_items,), higher is better."""
        rows = self._niches.items
        return tuple((member.id, rows[slot].copy()) for slot, member in enumerate(self._members))

    def _propose(self) -> Proposal:
        if self._on_weights:
            return self._missing_seed() or self._warm_up_merge() or self._child()
        if len(self._members) + len(self._filling) < self.options.population_size or len(self._members) < 2:
            self._filling.add(self._next_id)
            return Proposal(self._initial.next())
        return self._child()

    def _learn(self, told: Told) -> None:
        self._filling.discard(told.candidate.id)
        self._note_seed(told)
        if told.losses is None:
            return
        items = np.asarray(told.items if told.items is not None else [-loss for loss in told.losses], dtype=np.float64)
        if not self._niches.fits(items):
            return
        slot = self._niches.add(items)
        if slot is not None:
            self._members[slot : slot + 1] = [told.candidate]

    def _learn_again(self, told: Told) -> None:
        """Do not add the known result again: it is or was a member already, and parents must be real candidates."""
        self._filling.discard(told.candidate.id)

    def _withdraw(self) -> bool:
        self._filling.discard(self._next_id)
        return True

    def _note_seed(self, told: Told) -> None:
        index = _unit_vector(told.candidate)
        if self._on_weights and index is not None:
            self._seed_models.setdefault(index, told.candidate.id)
            if told.losses is None:
                self._failed_seeds.add(index)

    def _missing_seed(self) -> Proposal | None:
        """The first seed model that is neither known nor pending; None if there is none."""
        missing = next((index for index in range(self.dimension) if index not in self._seed_models), None)
        if missing is None:
            return None
        self._seed_models[missing] = self._next_id
        return Proposal(VectorGenome(tuple(float(index == missing) for index in range(self.dimension))))

    def _warm_up_merge(self) -> Proposal | None:
        """A crossover of two random seed models; None after enough of them."""
        wanted = self.options.warm_up
        if wanted is None:
            wanted = max(0, self.options.population_size - self.dimension)
        if self._n_warmed_up >= wanted and len(self._members) >= 2:
            return None
        self._n_warmed_up += 1
        good = [index for index in self._seed_models if index not in self._failed_seeds]
        pool = sorted(good if len(good) >= 2 else self._seed_models)
        first, second = self._generator.choice(len(pool), 2, replace=False).tolist()
        return self._cross_weights(self._seed_models[pool[first]], self._seed_models[pool[second]])

    def _child(self) -> Proposal:
        slots = self._niches.parents(self._generator, attracted=self.options.attraction)
        first, second = (self._members[slot] for slot in slots)
        if self._on_weights:
            return self._cross_weights(first.id, second.id)
        return self._cross_points(first, second)

    def _cross_weights(self, first: str, second: str) -> Proposal:
        mix = self._generator.random()
        n_splits = self.options.chromosomes
        splits = self._generator.random(n_splits).tolist() if self.options.split_point else [0.0] * n_splits
        mutation = Mutation(int(self._generator.integers(2**63)), self._sigma) if self._sigma > 0.0 else None
        return Proposal(CrossoverGenome((first, second), mix, tuple(splits), mutation), (first, second))

    def _cross_points(self, first: Candidate, second: Candidate) -> Proposal:
        mix = self._generator.random()
        split = int(self._generator.integers(self.dimension)) if self.options.split_point else 0
        share = np.where(np.arange(self.dimension) < split, mix, 1.0 - mix)
        a, b = np.array(first.point), np.array(second.point)
        child = (1.0 - share) * a + share * b
        if self._sigma > 0.0:
            child = child + self._sigma * self._generator.standard_normal(self.dimension)
        if len(self._discrete):
            rate = min(0.5, 1.0 / self.dimension) if self._sigma > 0.0 else 0.0
            child[self._discrete] = inherited_choices(
                a[self._discrete], b[self._discrete], self._counts, rate, self._generator
            )
        return Proposal(VectorGenome(tuple(np.clip(child, 0.0, 1.0).tolist())), (first.id, second.id))


def _unit_vector(candidate: Candidate) -> int | None:
    """The index of the coordinate that is 1 while all others are 0; None if the candidate is not such a point."""
    if not isinstance(candidate.genome, VectorGenome):
        return None
    ones = [index for index, value in enumerate(candidate.genome.values) if value == 1.0]
    return ones[0] if len(ones) == 1 and sum(candidate.genome.values) == 1.0 else None
