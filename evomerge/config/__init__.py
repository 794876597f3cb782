"""The configuration schema and its YAML files."""

from evomerge.config.load import load_config, parse_config, settings_in
from evomerge.config.schema import (
    BudgetConfig,
    LmEvalConfig,
    ObjectiveConfig,
    SearchConfig,
    SpaceConfig,
    StackingConfig,
    SyntheticConfig,
    TaskConfig,
)

__all__ = [
    "BudgetConfig",
    "LmEvalConfig",
    "ObjectiveConfig",
    "SearchConfig",
    "SpaceConfig",
    "StackingConfig",
    "SyntheticConfig",
    "TaskConfig",
    "load_config",
    "parse_config",
    "settings_in",
]
