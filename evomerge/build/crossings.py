"""config -> the lineage of a search that crosses models (`m2n2`): seed models, chromosomes, and inner products of the seeds."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evomerge.build.sources import written_dtype
from evomerge.config import SearchConfig
from evomerge.core import Candidate, CrossoverGenome, VectorGenome
from evomerge.plan import MergePlan, ModelHeader, TensorStep, make_plan
from evomerge.recipe import (
    REST,
    Angle,
    Lineage,
    Recipe,
    SeedProducts,
    Setting,
    Slice,
    Source,
    SplitAt,
    WeightLayout,
    group_of,
    module_filters,
)


def crosses_models(config: SearchConfig) -> bool:
    """Whether the strategy proposes crossovers of models instead of points of a recipe space."""
    return config.strategy.name == "m2n2" and config.strategy.options.get("on") != "recipes"


class Crossings:
    """The seed models and chromosomes that the crossovers of a search work on.

    Args:
        config: the search.
        headers: model headers, the base first.

    Raises:
        SpaceError: a module group contains no tensors of these models.
        RecipeError: the models are incompatible with each other.
    """

    def __init__(self, config: SearchConfig, headers: Mapping[str, ModelHeader]) -> None:
        self._config, self._headers = config, headers
        self.seeds = tuple(Source(key) for key in config.expert_keys.values())
        self.chromosomes = self._chromosomes()
        self.layout = WeightLayout(
            tuple(tuple((step.output, step.n_elements) for step in steps) for steps in self.chromosomes)
        )

    def lineage(self) -> Lineage:
        """The lineage of the search. All weights of the seeds are read once, when their inner products are first needed."""
        wanted = self._config.space.crossover
        return Lineage(
            self.seeds,
            self.layout,
            _Products({seed.key: self._headers[seed.key] for seed in self.seeds}, self.chromosomes),
            angle=Angle(wanted.angle),
            split=SplitAt(wanted.split),
            out_dtype=written_dtype(self._config, self._headers),
        )

    def plan(self) -> MergePlan:
        """The plan of a child of two seeds, split in the middle. Reads no weights."""
        zero, one = (VectorGenome(tuple(float(i == k) for i in range(len(self.seeds)))) for k in (0, 1))
        n_splits = len(self.chromosomes)
        child = Candidate("plan", CrossoverGenome(("0", "1"), 0.5, (0.5,) * n_splits))
        # the first seed left of each split, the second right of it; with given factors no inner products are needed
        lineage, factors = self.lineage(), [1.0, 0.0, 0.0, 1.0] * n_splits
        made = lineage.combination(child, {"0": zero, "1": one}.__getitem__, lambda name: factors)
        return make_plan(lineage.recipe_of(made), self._headers)

    def _chromosomes(self) -> list[list[TensorStep]]:
        """The steps of a plan that sums all seeds, by module group."""
        sources = tuple(Source(seed.model, parameters={"weight": (Setting(1.0),)}) for seed in self.seeds)
        plan = make_plan(Recipe("linear", (Slice(sources),)), self._headers)
        steps = [step for step in plan.steps if not step.is_copy]
        groups = self._config.space.module_groups or (REST,)
        filters = module_filters(groups, [step.output for step in steps if step.n_elements])
        chromosomes: dict[str, list[TensorStep]] = {group: [] for group in groups}
        for step in steps:
            chromosomes[group_of(step.output, filters)].append(step)
        return list(chromosomes.values())


class _Products:
    """Inner products of the seeds, computed on first use; raises CheckpointError then if a seed contains NaN or infinity."""

    def __init__(self, headers: Mapping[str, ModelHeader], chromosomes: Sequence[Sequence[TensorStep]]) -> None:
        self._headers, self._chromosomes = headers, chromosomes

    def before(self, chromosome: int, position: int) -> NDArray[np.float64]:
        """See `SeedGram.before`."""
        return self._gram.before(chromosome, position)

    @cached_property
    def _gram(self) -> SeedProducts:
        from evomerge.weights import WeightPool
        from evomerge.weights.gram import SeedGram

        return SeedGram(WeightPool(self._headers), self._chromosomes)
