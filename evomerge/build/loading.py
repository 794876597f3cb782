"""`load_config`: a configuration file with what a search sets unless told otherwise written out, so that a run keeps what it began with."""

from collections.abc import Sequence

from evomerge.build.crossings import crosses_models
from evomerge.config import SearchConfig
from evomerge.config import load_config as read_config
from evomerge.core import FilePath
from evomerge.recipe import METHODS, default_switches


def load_config(path: FilePath, overrides: Sequence[str] = ()) -> SearchConfig:
    """Reads a configuration file; model, task, recipe and data paths become absolute (relative ones count from the file).

    Args:
        path: YAML file.
        overrides: `a.b=value` settings, the value read as YAML; `tasks.0.limit=50` reaches into a list.

    Raises:
        ConfigError: no such file, not YAML, or wrong; the message lists every wrong key with the nearest valid one.
    """
    config = read_config(path, overrides)
    space, spec = config.space, METHODS.get(config.space.method)
    weights_are_searched = space.parameters is None or "weight" in space.parameters
    if spec is None or config.models is None or crosses_models(config) or not weights_are_searched:
        return config
    fixed = {name: value for name, value in default_switches(spec).items() if name not in space.fixed}
    return config.model_copy(update={"space": space.model_copy(update={"fixed": {**space.fixed, **fixed}})})
