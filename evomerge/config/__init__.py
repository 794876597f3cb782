"""The configuration schema and its YAML files."""

from evomerge.config.load import load_config, parse_config
from evomerge.config.schema import LmEvalConfig, SearchConfig, SyntheticConfig

__all__ = ["LmEvalConfig", "SearchConfig", "SyntheticConfig", "load_config", "parse_config"]
