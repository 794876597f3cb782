"""Models as the command line names them: `FOLDER`, `NAME=FOLDER`, `FOLDER+ADAPTER` or `ORG/NAME`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from evomerge.core import ConfigError, cached_model, model_name
from evomerge.recipe import Source


def parse_model(expert: str) -> tuple[str, Source]:
    """(name, model); the name is "" if none is given."""
    name, separator, path = expert.partition("=")
    if not separator or Path(expert).is_dir():
        name, path = "", expert
    model, _, lora = (path, "", "") if Path(path).is_dir() else path.partition("+")
    return name, Source(model, lora=lora or None)


def sources_by_name(experts: Sequence[tuple[str, Source]]) -> dict[str, Source]:
    """name -> model; a model without a name gets its `default_name`.

    Raises:
        ConfigError: two models have the same name.
    """
    sources: dict[str, Source] = {}
    for given, source in experts:
        name = given or default_name(source)
        if name in sources:
            raise ConfigError(f"two models are called {name!r}; give them names, e.g. first={source.key}")
        sources[name] = source
    return sources


def default_name(source: Source) -> str:
    """The default name of an expert: that of its folder, or of its model on the hub."""
    folder = Path(source.lora or source.model).resolve()
    return re.sub(r"[^\w.-]", "-", model_name(str(folder)).rpartition("/")[2]).lstrip(".-")


def resolve_hub_models(source: Source) -> Source:
    """The source with names of models in the local hub cache replaced by their folders."""
    return source.moved(lambda path: path if Path(path).exists() else str(cached_model(path) or path))


def relative_to(folder: Path, source: Source) -> str:
    """How a configuration file in `folder` refers to the source."""
    return source.moved(lambda path: path_from(path, folder)).key


def path_from(text: str, folder: Path) -> str:
    """The path relative to `folder`; if outside of it with symbolic links resolved, and absolute if more than three levels up.

    The name of a model in the hub cache is kept.
    """
    if not Path(text).exists() and cached_model(text) is not None:
        return text
    path = Path(text).absolute()
    if not path.is_relative_to(folder) or ".." in path.parts:
        path = path.resolve()
    place = os.path.relpath(path, folder)
    return str(path) if place.count("..") > 3 else place if place.startswith(".") else f"./{place}"
