"""A merge as data, for a process that holds a shard of the engine: it reads the sources itself and writes its own part."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from evomerge.core import Json
from evomerge.plan import ModelHeader, WeightTarget, make_plan, read_model_header
from evomerge.recipe import Recipe
from evomerge.weights.merger import Merger
from evomerge.weights.pool import WeightPool

WRITE_MERGE = "evomerge.weights.remote_merge:write_merge"
"""How `evomerge.engine.RemoteWrite` names `write_merge`."""


def write_merge(settings: Mapping[str, Json], target: WeightTarget) -> None:
    """Writes a recipe's weights into `target`.

    Args:
        settings: `recipe` (as JSON), and `models`, the folders that recipes of this run may name; those stay loaded.
        target: what this process holds.

    Raises:
        EvomergeError: as `make_plan` and `Merger.write`.
    """
    merger, headers = _sources(tuple(str(path) for path in cast(list[str], settings["models"])))
    merger.write(make_plan(Recipe.from_json(cast(Mapping[str, Any], settings["recipe"])), headers), target)


@cache
def _sources(models: tuple[str, ...]) -> tuple[Merger, Mapping[str, ModelHeader]]:
    headers = {path: read_model_header(Path(path)) for path in models}
    return Merger(WeightPool(headers)), headers
