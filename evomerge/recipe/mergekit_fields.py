"""Helpers for all parts of a mergekit document: model references, and which keys belong where."""

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.core import RecipeError
from evomerge.recipe.methods import METHODS
from evomerge.recipe.parts import Source
from evomerge.recipe.values import mapping_of, optional_text, text_of

PARAMETERS = frozenset(
    parameter.name for method in METHODS.values() for parameter in (*method.parameters, *method.inert)
)
"""names of the parameters of all methods"""


def model_reference(data: Any, where: str) -> Source:
    """Parse a model reference (text `path@revision+lora` or mergekit's mapping form) into a source without layers and parameters."""
    if isinstance(data, str) and data:
        model, plus, lora = data.partition("+")
        path, _, revision = model.partition("@")
        if not path or (plus and not lora) or "@" in revision or any(mark in lora for mark in "+@"):
            raise RecipeError(f"{where}: {data!r} is not a model reference 'path[@revision][+lora]'")
        return Source(path, revision=revision or None, lora=lora or None)
    if isinstance(data, Mapping):
        # mergekit looks up tensor names by architecture; evomerge takes them from the files, so the override is ignored
        fields = mapping_of(data, where, ("model", "lora", "override_architecture"))
        path, pinned = _path(fields.get("model"), f"{where}.model")
        if fields.get("lora") is None:
            return Source(path, revision=pinned)
        adapter, adapter_revision = _path(fields["lora"], f"{where}.lora")
        if adapter_revision is not None:
            raise RecipeError(
                f"{where}.lora: only hub models can have a revision; give the folder of that revision instead"
            )
        return Source(path, revision=pinned, lora=adapter)
    raise RecipeError(f"{where}: expected a model path, got {data!r}")


def reference_of(source: Source) -> Any:
    """The inverse of `model_reference`: text, or a mapping if a path contains `@` or `+`."""
    if not any(mark in text for text in (source.model, source.lora or "") for mark in "@+"):
        return source.key
    path = {"path": source.model} | ({} if source.revision is None else {"revision": source.revision})
    return {"model": path} | ({"lora": {"path": source.lora}} if source.lora else {})


def _path(data: Any, where: str) -> tuple[str, str | None]:
    """Path and revision of `data`: text `path@revision` or a mapping."""
    if isinstance(data, Mapping):
        fields = mapping_of(data, where, ("path", "revision"))
        return text_of(fields.get("path"), f"{where}.path"), optional_text(fields.get("revision"), f"{where}.revision")
    path, _, after = text_of(data, where).partition("@")
    return path, after or None


def fields_of(data: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    """Like `mapping_of`, with hints for keys that are often misplaced."""
    for key in data if isinstance(data, Mapping) else ():
        if key not in known and "parameters" in known and key in PARAMETERS:
            raise RecipeError(f"{where}: unknown key {key!r}; it belongs under 'parameters'")
        if key not in known and key == "revision" and "model" in known:
            raise RecipeError(f"{where}: unknown key 'revision'; write `model: PATH@REVISION`")
    return mapping_of(data, where, known)
