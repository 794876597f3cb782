"""config -> strategy."""

from typing import TYPE_CHECKING

from evomerge.strategy import Strategy, make_strategy

if TYPE_CHECKING:
    from evomerge.build.problem import Problem


def strategy_for(problem: "Problem") -> Strategy:
    """A fresh strategy for `problem`, seeded with the run's seed.

    Raises:
        ConfigError: an unknown strategy or option.
    """
    wanted = problem.config.strategy
    return make_strategy(
        wanted.name,
        dimension=problem.space.dimension,
        objectives=problem.objectives,
        seed=problem.config.seed,
        **wanted.options,
    )
