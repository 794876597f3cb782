"""config -> strategy."""

from typing import TYPE_CHECKING

from evomerge.core import ConfigError
from evomerge.strategy import Strategy, make_strategy

if TYPE_CHECKING:
    from evomerge.build.problem import Problem


def strategy_for(problem: "Problem") -> Strategy:
    """A fresh strategy for `problem`, seeded with the run's seed.

    Raises:
        ConfigError: an unknown strategy or option, or a population that the budget does not even fill once.
    """
    wanted, budget = problem.config.strategy, problem.config.budget.evaluations
    size = wanted.options.get("population_size")
    if isinstance(size, int) and budget is not None and size > budget:
        raise ConfigError(
            f"strategy.population_size: {size} is more than budget.evaluations, {budget}: nothing would ever be selected. "
            "Lower it, or raise the budget"
        )
    options = wanted.options
    if problem.crossings is not None:
        if "chromosomes" in options:
            raise ConfigError("strategy.chromosomes: follows from space.module_groups; remove it")
        options["chromosomes"] = len(problem.crossings.chromosomes)
    return make_strategy(
        wanted.name,
        dimension=problem.space.dimension,
        objectives=problem.objectives,
        seed=problem.config.seed,
        choices=problem.space.choices,
        **options,
    )
