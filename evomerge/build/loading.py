"""`load_config`: reads a configuration and writes out defaults that depend on other settings, so that a run keeps them when it is resumed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.build.crossings import crosses_models
from evomerge.config import Overrides, SearchConfig, parse_config, read_config
from evomerge.core import ConfigError, FilePath
from evomerge.recipe import METHODS, default_switches

AnyConfig = SearchConfig | FilePath | Mapping[str, Any]
"""a configuration, a configuration file, or a mapping of settings"""


def as_config(config: AnyConfig) -> SearchConfig:
    """Load the configuration unless it is loaded already.

    Raises:
        ConfigError: see `load_config`.
    """
    return config if isinstance(config, SearchConfig) else load_config(config)


def load_config(path: FilePath | Mapping[str, Any], overrides: Overrides = ()) -> SearchConfig:
    """Read a configuration and make the paths of models, task files and recipe files absolute (they are relative to the file).

    Args:
        path: YAML file, or a mapping of settings, whose paths are relative to the working directory.
        overrides: `a.b=value` settings, one or several, with the value in YAML, or a mapping of `a.b` to values; `tasks.0.limit` is a setting
            of a list element.

    Raises:
        ConfigError: the file is missing, not YAML, or invalid; the message lists every wrong key with the nearest valid one.
    """
    if isinstance(overrides, Mapping):
        overrides = _plain(overrides)
    if not isinstance(path, str | os.PathLike | Mapping):
        raise ConfigError(f"expected a configuration file or a mapping of settings, got {type(path).__name__}")
    if isinstance(path, Mapping):
        config = parse_config(_plain(path), folder=Path.cwd(), overrides=overrides)
    else:
        config = read_config(path, overrides)
    return _with_switches(_with_effort(config))


def _with_switches(config: SearchConfig) -> SearchConfig:
    """Add the values that a search over weights gives to the method's switches by default."""
    space = config.space
    # with several methods, the template of each sets its switches
    spec = METHODS.get(space.method) if isinstance(space.method, str) else None
    if spec is None or config.models is None or crosses_models(config) or not space.searches_weights:
        return config
    fixed = {name: value for name, value in default_switches(spec).items() if name not in space.fixed}
    return config.model_copy(update={"space": space.model_copy(update={"fixed": {**space.fixed, **fixed}})})


def _with_effort(config: SearchConfig) -> SearchConfig:
    """Add the numbers of evaluations and workers to nevergrad's options, by which it chooses its optimiser."""
    if config.strategy.name != "nevergrad":
        return config
    n_evaluations, n_workers = config.budget.evaluations, config.cluster.workers
    known: dict[str, int] = {} if n_evaluations is None else {"budget": n_evaluations}
    if isinstance(n_workers, int) and n_workers > 1:
        known["n_workers"] = n_workers
    return config.model_copy(
        update={"strategy": config.strategy.model_copy(update={**known, **config.strategy.options})}
    )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings as plain YAML types: paths become strings, tuples and arrays become lists."""

    def plain_form(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return str(os.fspath(value))
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        raise ConfigError(
            f"{value!r} cannot be a setting; expected strings, numbers, paths, true, false, or lists and mappings of these, got {type(value).__name__}"
        )

    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=plain_form))
    return plain
