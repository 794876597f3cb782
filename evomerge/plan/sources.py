"""Reads the headers of the models that a recipe names: folders, optionally with an adapter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from evomerge.core import RecipeError
from evomerge.plan.adapter import read_adapter
from evomerge.plan.model_folder import read_model_header
from evomerge.plan.model_header import ModelHeader
from evomerge.recipe import Recipe, Source


def read_source(source: Source, *, trust_remote_code: bool = False) -> ModelHeader:
    """The metadata of a source's model, with its adapter.

    Raises:
        RecipeError: the source has a pinned revision, which only hub models can have.
        CheckpointError: as for `read_model_header` and `read_adapter`.
    """
    if source.revision is not None:
        raise RecipeError(
            f"{source.key}: only hub models can have a revision; give the folder of that revision instead"
        )
    header = read_model_header(Path(source.model), trust_remote_code=trust_remote_code)
    return header if source.lora is None else replace(header, adapter=read_adapter(source.lora, header))


ModelTable = Mapping[str, tuple[str, str | None]]
"""Model key in recipes -> its folder and the folder of its adapter. In JSON, pairs are lists."""


def read_models(table: ModelTable) -> dict[str, ModelHeader]:
    """The header of every model of a table.

    Raises:
        CheckpointError: as for `read_source`.
    """
    return {key: read_source(Source(model, lora=lora)) for key, (model, lora) in table.items()}


def table_of(headers: Mapping[str, ModelHeader]) -> dict[str, tuple[str, str | None]]:
    """The table from which `read_models` gives `headers`."""
    return {
        key: (str(header.folder), None if header.adapter is None else str(header.adapter.folder))
        for key, header in headers.items()
    }


def read_headers(recipe: Recipe, *, trust_remote_code: bool = False) -> dict[str, ModelHeader]:
    """The header of every model of `recipe`, by its key.

    Raises:
        RecipeError, CheckpointError: as for `read_source`.
    """
    return {key: read_source(recipe.source(key), trust_remote_code=trust_remote_code) for key in recipe.models()}
