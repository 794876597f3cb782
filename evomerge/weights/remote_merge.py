"""A merge as data, for processes that hold a shard of the engine: each reads the sources itself and writes its own part."""

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
"""The name of `write_merge` for `evomerge.engine.RemoteWrite`."""


def write_merge(settings: Mapping[str, Json], target: WeightTarget) -> None:
    """Write a recipe's weights into `target`.

    Args:
        settings: `recipe` (as JSON); `models`, the table of all models that recipes of this run may name (which stay loaded); optionally
            `gpu_bytes`, see `Merger`.
        target: the weights of this process.

    Raises:
        EvomergeError: as for `make_plan` and `Merger.write`.
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
    """The number of threads set in the environment; on a GPU, vLLM later reduces torch to one thread in its processes."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else None
