"""A merge as data, for a process that holds a shard of the engine: it reads the sources itself and writes its own part."""

import os
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from evomerge.core import Json
from evomerge.plan import ModelHeader, ModelTable, WeightTarget, make_plan, read_models
from evomerge.recipe import Recipe
from evomerge.weights.merger import Merger
from evomerge.weights.pool import WeightPool

WRITE_MERGE = "evomerge.weights.remote_merge:write_merge"
"""How `evomerge.engine.RemoteWrite` names `write_merge`."""


def write_merge(settings: Mapping[str, Json], target: WeightTarget) -> None:
    """Writes a recipe's weights into `target`.

    Args:
        settings: `recipe` (as JSON), `models`, the table of those that recipes of this run may name (those stay loaded), and maybe `gpu_bytes`,
            see `Merger`.
        target: what this process holds.

    Raises:
        EvomergeError: as `make_plan` and `Merger.write`.
    """
    table = cast(ModelTable, settings["models"])
    models = tuple((key, model, lora) for key, (model, lora) in table.items())
    merger, headers = _sources(models, cast(float | None, settings.get("gpu_bytes")))
    merger.write(make_plan(Recipe.from_json(cast(Mapping[str, Any], settings["recipe"])), headers), target)


@cache
def _sources(
    models: tuple[tuple[str, str, str | None], ...], gpu_bytes: float | None
) -> tuple[Merger, Mapping[str, ModelHeader]]:
    headers = read_models({key: (model, lora) for key, model, lora in models})
    return Merger(WeightPool(headers), threads=_threads(), gpu_bytes=gpu_bytes), headers


def _threads() -> int | None:
    """What the environment allows: on a GPU vLLM leaves torch one thread in its processes, once they have their share of the cores there."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else None
