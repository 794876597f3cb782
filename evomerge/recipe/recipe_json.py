"""`Recipe` as JSON and back: lossless, versioned, every key checked.

Knows nothing of YAML or files.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from evomerge.core import Json, RecipeError
from evomerge.recipe.recipe import Parameters, Recipe, Setting, Slice, Source

FORMAT_VERSION = 1
"""Of the JSON form; raised when a key changes its meaning. Readers refuse newer versions."""

_RECIPE_KEYS = (
    "version",
    "method",
    "slices",
    "base",
    "parameters",
    "dtype",
    "out_dtype",
    "seed",
    "tokenizer_source",
    "name",
)


def recipe_to_json(recipe: Recipe) -> dict[str, Json]:
    """See `Recipe.to_json`."""
    return {
        "version": FORMAT_VERSION,
        "method": recipe.method,
        "slices": [
            {
                "sources": [_source_to_json(source) for source in piece.sources],
                "parameters": _parameters_to_json(piece.parameters),
            }
            for piece in recipe.slices
        ],
        "base": recipe.base,
        "parameters": _parameters_to_json(recipe.parameters),
        "dtype": recipe.dtype,
        "out_dtype": recipe.out_dtype,
        "seed": recipe.seed,
        "tokenizer_source": recipe.tokenizer_source,
        "name": recipe.name,
    }


def recipe_from_json(data: Mapping[str, Json]) -> Recipe:
    """See `Recipe.from_json`."""
    fields = _object(data, "recipe", _RECIPE_KEYS, required=("method", "slices"))
    version = fields.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise RecipeError(
            f"recipe: format version {version!r}; this evomerge reads version {FORMAT_VERSION}: upgrade evomerge"
        )
    return Recipe(
        method=_text(fields["method"], "method"),
        slices=tuple(
            _slice_from_json(entry, f"slices[{index}]") for index, entry in enumerate(_list(fields["slices"], "slices"))
        ),
        base=_optional_text(fields.get("base"), "base"),
        parameters=_parameters_from_json(fields.get("parameters", {}), "parameters"),
        dtype=_optional_text(fields.get("dtype"), "dtype"),
        out_dtype=_optional_text(fields.get("out_dtype"), "out_dtype"),
        seed=_integer(fields.get("seed", 0), "seed"),
        tokenizer_source=_optional_text(fields.get("tokenizer_source"), "tokenizer_source"),
        name=_optional_text(fields.get("name"), "name"),
    )


def _source_to_json(source: Source) -> Json:
    return {
        "model": source.model,
        "layer_range": None if source.layer_range is None else list(source.layer_range),
        "parameters": _parameters_to_json(source.parameters),
        "revision": source.revision,
        "lora": source.lora,
    }


def _parameters_to_json(parameters: Parameters) -> dict[str, Json]:
    return {
        name: [
            {
                "value": list(setting.value) if isinstance(setting.value, tuple) else setting.value,
                "filter": setting.filter,
            }
            for setting in settings
        ]
        for name, settings in parameters.items()
    }


def _slice_from_json(data: Json, where: str) -> Slice:
    fields = _object(data, where, ("sources", "parameters"), required=("sources",))
    sources = tuple(
        _source_from_json(entry, f"{where}.sources[{index}]")
        for index, entry in enumerate(_list(fields["sources"], f"{where}.sources"))
    )
    return Slice(sources, _parameters_from_json(fields.get("parameters", {}), f"{where}.parameters"))


def _source_from_json(data: Json, where: str) -> Source:
    fields = _object(data, where, ("model", "layer_range", "parameters", "revision", "lora"), required=("model",))
    layer_range = fields.get("layer_range")
    if layer_range is not None:
        first, last = _pair(layer_range, f"{where}.layer_range")
        layer_range = (first, last)
    return Source(
        model=_text(fields["model"], f"{where}.model"),
        layer_range=layer_range,
        parameters=_parameters_from_json(fields.get("parameters", {}), f"{where}.parameters"),
        revision=_optional_text(fields.get("revision"), f"{where}.revision"),
        lora=_optional_text(fields.get("lora"), f"{where}.lora"),
    )


def _parameters_from_json(data: Json, where: str) -> dict[str, tuple[Setting, ...]]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"recipe {where}: expected an object, got {data!r}")
    return {
        name: tuple(
            _setting_from_json(entry, f"{where}.{name}[{index}]")
            for index, entry in enumerate(_list(settings, f"{where}.{name}"))
        )
        for name, settings in data.items()
    }


def _setting_from_json(data: Json, where: str) -> Setting:
    fields = _object(data, where, ("value", "filter"), required=("value",))
    value = fields["value"]
    if isinstance(value, list | tuple):
        value = tuple(value)
    elif not isinstance(value, bool | int | float | str):
        raise RecipeError(f"recipe {where}.value: expected a number, switch, text or list of numbers, got {value!r}")
    return Setting(value, _optional_text(fields.get("filter"), f"{where}.filter"))


def _object(data: Json, where: str, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"recipe {where}: expected an object, got {data!r}")
    for key in data:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise RecipeError(f"recipe {where}: unknown key {key!r}{hint}")
    for key in required:
        if key not in data:
            raise RecipeError(f"recipe {where}: key {key!r} is missing")
    return dict(data)


def _list(data: Json, where: str) -> Sequence[Json]:
    if not isinstance(data, list | tuple):
        raise RecipeError(f"recipe {where}: expected a list, got {data!r}")
    return data


def _pair(data: Json, where: str) -> tuple[int, int]:
    values = _list(data, where)
    if len(values) != 2:
        raise RecipeError(f"recipe {where}: expected [first, last), got {data!r}")
    return _integer(values[0], where), _integer(values[1], where)


def _text(data: Json, where: str) -> str:
    if not isinstance(data, str) or not data:
        raise RecipeError(f"recipe {where}: expected text, got {data!r}")
    return data


def _optional_text(data: Json, where: str) -> str | None:
    return None if data is None else _text(data, where)


def _integer(data: Json, where: str) -> int:
    if isinstance(data, bool) or not isinstance(data, int):
        raise RecipeError(f"recipe {where}: expected a whole number, got {data!r}")
    return data
