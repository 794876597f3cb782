"""Validates plain data from YAML and JSON: mappings with known keys, lists, texts, whole numbers. Every message says where."""

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.core import RecipeError, did_you_mean


def mapping_of(data: Any, where: str, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
    """`data` as a mapping with only keys in `known` and all of `required`; else RecipeError."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping with {', '.join(known)}; got {data!r}")
    for key in data:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)} Known: {', '.join(known)}")
    for key in required:
        if key not in data:
            raise RecipeError(f"{where}: key {key!r} is missing")
    return dict(data)


def list_of(data: Any, where: str, *, least: int = 0) -> list[Any]:
    """`data` as a list with at least `least` entries; else RecipeError."""
    if not isinstance(data, list) or len(data) < least:
        raise RecipeError(f"{where}: expected a list{' with at least one entry' if least else ''}, got {data!r}")
    return data


def text_of(data: Any, where: str) -> str:
    """`data` as nonempty text; else RecipeError."""
    if not isinstance(data, str) or not data:
        raise RecipeError(f"{where}: expected text, got {data!r}")
    return data


def optional_text(data: Any, where: str) -> str | None:
    """`data` as text, or None; else RecipeError."""
    return None if data is None else text_of(data, where)


def whole_number(data: Any, where: str, *, least: int | None = None) -> int:
    """`data` as a whole number of at least `least`; else RecipeError."""
    if isinstance(data, bool) or not isinstance(data, int) or (least is not None and data < least):
        raise RecipeError(f"{where}: expected a whole number{'' if least is None else f' from {least}'}, got {data!r}")
    return data


def layer_range_of(data: Any, where: str) -> tuple[int, int]:
    """`data` as layers [first, last); else RecipeError."""
    if not isinstance(data, list) or len(data) != 2:
        raise RecipeError(f"{where}: expected [first, last) as two whole numbers, got {data!r}")
    return whole_number(data[0], where), whole_number(data[1], where)
