"""The parts of a recipe as JSON and back: lossless, every key checked.

Knows nothing of YAML or files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.core import Json, RecipeError, did_you_mean
from evomerge.recipe.parts import Parameters, Setting, Slice, Source

FORMAT_VERSION = 1
"""Of the JSON form; raised when a key changes its meaning. Readers refuse newer versions."""


def slices_to_json(slices: Sequence[Slice]) -> list[Json]:
    """What `slices_from_json` reads."""
    return [
        {
            "sources": [_source_to_json(source) for source in piece.sources],
            "parameters": parameters_to_json(piece.parameters),
            "module": piece.module,
            **({} if piece.base is None else {"base": piece.base}),
        }
        for piece in slices
    ]


def slices_from_json(data: Json, where: str) -> tuple[Slice, ...]:
    """Raises RecipeError naming the ill-typed, unknown or missing key."""
    return tuple(_slice_from_json(entry, f"{where}[{index}]") for index, entry in enumerate(_list(data, where)))


def _source_to_json(source: Source) -> Json:
    return {
        "model": source.model,
        "layer_range": None if source.layer_range is None else list(source.layer_range),
        "parameters": parameters_to_json(source.parameters),
        "revision": source.revision,
        "lora": source.lora,
    }


def parameters_to_json(parameters: Parameters) -> dict[str, Json]:
    """What `parameters_from_json` reads."""
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
    fields = checked_object(data, where, ("sources", "parameters", "module", "base"), required=("sources",))
    sources = tuple(
        _source_from_json(entry, f"{where}.sources[{index}]")
        for index, entry in enumerate(_list(fields["sources"], f"{where}.sources"))
    )
    parameters = parameters_from_json(fields.get("parameters", {}), f"{where}.parameters")
    module, base = (optional_text(fields.get(key), f"{where}.{key}") for key in ("module", "base"))
    return Slice(sources, parameters, module, base)


def _source_from_json(data: Json, where: str) -> Source:
    fields = checked_object(
        data, where, ("model", "layer_range", "parameters", "revision", "lora"), required=("model",)
    )
    layer_range = fields.get("layer_range")
    if layer_range is not None:
        first, last = _pair(layer_range, f"{where}.layer_range")
        layer_range = (first, last)
    return Source(
        model=text(fields["model"], f"{where}.model"),
        layer_range=layer_range,
        parameters=parameters_from_json(fields.get("parameters", {}), f"{where}.parameters"),
        revision=optional_text(fields.get("revision"), f"{where}.revision"),
        lora=optional_text(fields.get("lora"), f"{where}.lora"),
    )


def parameters_from_json(data: Json, where: str) -> dict[str, tuple[Setting, ...]]:
    """Raises RecipeError naming the ill-typed, unknown or missing key."""
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
    fields = checked_object(data, where, ("value", "filter"), required=("value",))
    value = fields["value"]
    if isinstance(value, list | tuple):
        value = tuple(value)
    elif not isinstance(value, bool | int | float | str):
        raise RecipeError(f"recipe {where}.value: expected a number, switch, text or list of numbers, got {value!r}")
    return Setting(value, optional_text(fields.get("filter"), f"{where}.filter"))


def checked_object(data: Json, where: str, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
    """`data` as a mapping with no key outside `known` and all of `required`; else RecipeError. `where` is "" for the whole recipe."""
    place = f"recipe {where}".rstrip()
    if not isinstance(data, Mapping):
        raise RecipeError(f"{place}: expected an object, got {data!r}")
    for key in data:
        if key not in known:
            raise RecipeError(f"{place}: unknown key {key!r}{did_you_mean(key, known)} Known: {', '.join(known)}")
    for key in required:
        if key not in data:
            raise RecipeError(f"{place}: key {key!r} is missing")
    return dict(data)


def _list(data: Json, where: str) -> Sequence[Json]:
    if not isinstance(data, list | tuple):
        raise RecipeError(f"recipe {where}: expected a list, got {data!r}")
    return data


def _pair(data: Json, where: str) -> tuple[int, int]:
    values = _list(data, where)
    if len(values) != 2:
        raise RecipeError(f"recipe {where}: expected [first, last), got {data!r}")
    return integer(values[0], where), integer(values[1], where)


def text(data: Json, where: str) -> str:
    """`data` as text that is not empty; else RecipeError."""
    if not isinstance(data, str) or not data:
        raise RecipeError(f"recipe {where}: expected text, got {data!r}")
    return data


def optional_text(data: Json, where: str) -> str | None:
    """`data` as text, or None; else RecipeError."""
    return None if data is None else text(data, where)


def integer(data: Json, where: str) -> int:
    """`data` as a whole number; else RecipeError."""
    if isinstance(data, bool) or not isinstance(data, int):
        raise RecipeError(f"recipe {where}: expected a whole number, got {data!r}")
    return data
