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
"""up to which the surrogates of `map` can be paid for with a few hundred evaluations"""


class Choice(NamedTuple):
    """A strategy and why it was chosen."""

    name: str
    reason: str


def chosen_strategy(problem: "Problem") -> Choice:
    """The configured strategy; for `auto`, the one that the tables behind docs/strategies.md speak for."""
    wanted = problem.config.strategy.name
    if wanted != AUTO:
        return Choice(wanted, "configured")
    space, n_objectives = problem.space, len(problem.objectives)
    if any(space.choices):
        return Choice("nsga2" if n_objectives > 1 else "catcma", "the space has choices")
    if n_objectives == 1:
        return Choice("cma_es", "one objective")
    if n_objectives <= 3 and space.dimension <= MAP_DIMENSIONS:
        return Choice("map", f"{n_objectives} objectives, {space.dimension} dimensions")
    return Choice(
        "cycleqd" if n_objectives == 2 else "nsga3", f"{n_objectives} objectives, {space.dimension} dimensions"
    )


def check_options(config: SearchConfig) -> None:
    """Raises ConfigError for an unknown strategy, or an option that it does not have or take."""
    if config.strategy.name != AUTO:
        strategy_options(config.strategy.name, config.strategy.options)


def check_population(problem: "Problem") -> None:
    """Raises ConfigError where the budget does not fill the population even once."""
    size, budget = problem.config.strategy.options.get("population_size"), problem.config.budget.evaluations
    if isinstance(size, int) and budget is not None and size > budget:
        raise ConfigError(
            f"strategy.population_size: {size} is more than budget.evaluations, {budget}: nothing would ever be selected. "
            "Lower it, or raise the budget"
        )


def check_nested(problem: "Problem") -> None:
    """Raises ConfigError where nested `map` would take what is no weight for a source."""
    strategy = problem.config.strategy
    others = [item.name for item in problem.space.parameters if item.name.partition("[")[0] != "weight"]
    if strategy.name == "map" and strategy.options.get("nested") and problem.template is not None and others:
        raise ConfigError(
            f"strategy.nested: takes every coordinate for the weight of one source, and {others[0]} is none; search weights alone "
            "(space.parameters: {weight: {}}, the rest under space.fixed), or leave nested out"
        )


def strategy_for(problem: "Problem") -> Strategy:
    """A fresh strategy for `problem`, seeded with the run's seed.

    Raises:
        ConfigError: an unknown strategy or option.
    """
    options = problem.config.strategy.options
    if problem.crossings is not None:
        if "chromosomes" in options:
            raise ConfigError("strategy.chromosomes: follows from space.module_groups; remove it")
        options["chromosomes"] = len(problem.crossings.chromosomes)
    return make_strategy(
        chosen_strategy(problem).name,
        space=problem.space,
        objectives=problem.objectives,
        seed=problem.config.seed,
        **options,
    )


def one_thread() -> AbstractContextManager[object]:
    """Lets NumPy and SciPy multiply and decompose matrices in one thread while it is entered.

    Those of a strategy are so small that further threads mostly wait, on cores that workers need: 300 proposals of `cma_es` in 60 dimensions took 0.5 s of processor
    time, in two threads 5 to 16.
    """
    import scipy.linalg  # noqa: F401 - has a BLAS of its own, and only what is loaded is limited

    return threadpool_limits(1, user_api="blas")  # type: ignore[no-any-return]
