"""Ask/tell search strategies, one file per algorithm. They see unit vectors and Evaluations, nothing else.

A strategy's module, and the library behind it, is imported when the strategy is made.
"""

from evomerge.strategy.base import Proposal, Strategy, StrategyOptions, Told, candidate_id
from evomerge.strategy.registry import (
    AUTO,
    ENTRY_POINT_GROUP,
    STRATEGIES,
    make_strategy,
    strategy_class,
    strategy_names,
    strategy_options,
    strategy_options_schema,
)
from evomerge.strategy.replay import ReplayStrategy

__all__ = [
    "AUTO",
    "ENTRY_POINT_GROUP",
    "STRATEGIES",
    "Proposal",
    "ReplayStrategy",
    "Strategy",
    "StrategyOptions",
    "Told",
    "candidate_id",
    "make_strategy",
    "strategy_class",
    "strategy_names",
    "strategy_options",
    "strategy_options_schema",
]
