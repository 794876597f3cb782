"""The configuration schema and its YAML files."""

from evomerge.config.load import load_config, parse_config
from evomerge.config.schema import (
    LmEvalConfig,
    ObjectiveConfig,
    SearchConfig,
    SpaceConfig,
    StackingConfig,
    SyntheticConfig,
    TaskConfig,
)

__all__ = [
    "LmEvalConfig",
    "ObjectiveConfig",
    "SearchConfig",
    "SpaceConfig",
    "StackingConfig",
    "SyntheticConfig",
    "TaskConfig",
    "load_config",
    "parse_config",
]
