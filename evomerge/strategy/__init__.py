"""Ask/tell search strategies, one file per algorithm. They see only genomes (mostly unit vectors) and Evaluations.

A strategy's module and its library are imported when the strategy is created.
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
