"""The configuration schema and its YAML files."""

from evomerge.config.load import Overrides, parse_config, read_config, settings_in
from evomerge.config.mergekit_evolve import EvolveConfig, read_evolve_config
from evomerge.config.schema import (
    BudgetConfig,
    LmEvalConfig,
    ModelConfig,
    ObjectiveConfig,
    SearchConfig,
    SpaceConfig,
    StackingConfig,
    SyntheticConfig,
    TaskConfig,
    check_expert_name,
)

__all__ = [
    "BudgetConfig",
    "EvolveConfig",
    "LmEvalConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "Overrides",
    "SearchConfig",
    "SpaceConfig",
    "StackingConfig",
    "SyntheticConfig",
    "TaskConfig",
    "check_expert_name",
    "parse_config",
    "read_config",
    "read_evolve_config",
    "settings_in",
]
