"""config -> strategy."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

from threadpoolctl import threadpool_limits

from evomerge.config import SearchConfig
from evomerge.core import ConfigError
from evomerge.strategy import AUTO, Strategy, make_strategy, strategy_options

if TYPE_CHECKING:
    from evomerge.build.problem import Problem


MAP_DIMENSIONS = 20
"""up to this many dimensions a few hundred evaluations are enough for the surrogates of `map`"""

MAP_OBJECTIVES = 6
"""With more, the hypervolumes that `map` compares take seconds a proposal."""

MAP_DESIGNS = 3
"""With less than this many times the results that `map` waits for, `cycleqd` was mostly better (benchmarks/results/objectives-2026-11-30.md)."""


class Choice(NamedTuple):
    """A strategy and why it was chosen."""

    name: str
    reason: str


def chosen_strategy(problem: "Problem") -> Choice:
    """The configured strategy; for `auto`, the one that docs/strategies.md recommends."""
    wanted = problem.config.strategy.name
    if wanted != AUTO:
        return Choice(wanted, "configured")
    space, n_objectives = problem.space, len(problem.objectives)
    if any(space.choices):
        return Choice("nsga2" if n_objectives > 1 else "catcma", "the space has choices")
    if n_objectives == 1:
        return Choice("cma_es", "one objective")
    what, budget = f"{n_objectives} objectives, {space.dimension} dimensions", problem.config.budget.evaluations
    if n_objectives > MAP_OBJECTIVES or space.dimension > MAP_DIMENSIONS:
        return Choice("cycleqd", what)
    from evomerge.strategy.map_surrogate import default_design

    if budget is not None and budget < MAP_DESIGNS * default_design(space.dimension):
        return Choice("cycleqd", f"{what}, {budget} evaluations")
    return Choice("map", what)


def check_options(config: SearchConfig) -> None:
    """Raise ConfigError for an unknown strategy, an unknown option, or an option with an invalid value."""
    if config.strategy.name != AUTO:
        strategy_options(config.strategy.name, config.strategy.options)


def check_population(problem: "Problem") -> None:
    """Raise ConfigError if the budget is smaller than the population."""
    size, budget = problem.config.strategy.options.get("population_size"), problem.config.budget.evaluations
    if isinstance(size, int) and budget is not None and size > budget:
        raise ConfigError(
            f"strategy.population_size: {size} is more than budget.evaluations, {budget}, so nothing would ever be selected; "
            "lower it, or raise the budget"
        )


def check_nested(problem: "Problem") -> None:
    """Raise ConfigError if nested `map` would treat a parameter as the weight of a source that is not one."""
    strategy = problem.config.strategy
    names = [parameter.name for parameter in problem.space.parameters]
    others = [name for name in names if name.partition("[")[0] != "weight"]
    if strategy.name == "map" and strategy.options.get("nested") and problem.template is not None and others:
        raise ConfigError(
            f"strategy.nested: every searched parameter must be the weight of one source, but {others[0]} is not; search only weights "
            "(space.parameters: {weight: {}}, the rest in space.fixed), or leave nested out"
        )


def strategy_for(problem: "Problem") -> Strategy:
    """Make a new strategy for `problem`, seeded with the run's seed.

    Raises:
        ConfigError: the strategy or an option is unknown.
    """
    options = problem.config.strategy.options
    if problem.crossings is not None:
        if "chromosomes" in options:
            raise ConfigError("strategy.chromosomes: is set by space.module_groups; remove it")
        options["chromosomes"] = len(problem.crossings.chromosomes)
    return make_strategy(
        chosen_strategy(problem).name,
        space=problem.space,
        objectives=problem.objectives,
        seed=problem.config.seed,
        **options,
    )


def one_thread() -> AbstractContextManager[object]:
    """A context manager that limits the BLAS libraries of NumPy and SciPy to one thread.

    The matrices of a strategy are so small that more threads mostly busy-wait, on cores that workers need: 300 proposals of `cma_es` in 60 dimensions
    took 0.5 s of CPU time with one thread, and 5 to 16 s with two.
    """
    import scipy.linalg  # noqa: F401 - has its own BLAS, and only loaded libraries are limited

    return threadpool_limits(1, user_api="blas")  # type: ignore[no-any-return]
