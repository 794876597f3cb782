"""Converts the parts of a recipe to JSON and back: lossless, with every key checked.

Knows nothing of YAML or files.
"""

from collections.abc import Mapping, Sequence

from evomerge.core import Json, RecipeError
from evomerge.recipe.parts import Parameters, Setting, Slice, Source
from evomerge.recipe.values import layer_range_of, list_of, mapping_of, optional_text, text_of

FORMAT_VERSION = 1
"""Version of the JSON form; increased when a key changes its meaning. Readers refuse other versions."""


def slices_to_json(slices: Sequence[Slice]) -> list[Json]:
    """The inverse of `slices_from_json`."""
    return [
        {
            "sources": [_source_to_json(source) for source in part.sources],
            "parameters": parameters_to_json(part.parameters),
            "module": part.module,
            **({} if part.base is None else {"base": part.base}),
        }
        for part in slices
    ]


def slices_from_json(data: Json, where: str) -> tuple[Slice, ...]:
    """Raise RecipeError naming a key that is missing, unknown or of the wrong type."""
    return tuple(_slice_from_json(entry, f"{where}[{index}]") for index, entry in enumerate(list_of(data, where)))


def _source_to_json(source: Source) -> Json:
    return {
        "model": source.model,
        "layer_range": None if source.layer_range is None else list(source.layer_range),
        "parameters": parameters_to_json(source.parameters),
        "revision": source.revision,
        "lora": source.lora,
    }


def parameters_to_json(parameters: Parameters) -> dict[str, Json]:
    """The inverse of `parameters_from_json`."""
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
    fields = mapping_of(data, where, ("sources", "parameters", "module", "base"), required=("sources",))
    sources = tuple(
        _source_from_json(entry, f"{where}.sources[{index}]")
        for index, entry in enumerate(list_of(fields["sources"], f"{where}.sources"))
    )
    parameters = parameters_from_json(fields.get("parameters", {}), f"{where}.parameters")
    module, base = (optional_text(fields.get(key), f"{where}.{key}") for key in ("module", "base"))
    return Slice(sources, parameters, module, base)


def _source_from_json(data: Json, where: str) -> Source:
    fields = mapping_of(data, where, ("model", "layer_range", "parameters", "revision", "lora"), required=("model",))
    layer_range = fields.get("layer_range")
    return Source(
        model=text_of(fields["model"], f"{where}.model"),
        layer_range=None if layer_range is None else layer_range_of(layer_range, f"{where}.layer_range"),
        parameters=parameters_from_json(fields.get("parameters", {}), f"{where}.parameters"),
        revision=optional_text(fields.get("revision"), f"{where}.revision"),
        lora=optional_text(fields.get("lora"), f"{where}.lora"),
    )


def parameters_from_json(data: Json, where: str) -> dict[str, tuple[Setting, ...]]:
    """Raise RecipeError naming a key that is missing, unknown or of the wrong type."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping of parameters, got {data!r}")
    return {
        name: tuple(
            _setting_from_json(entry, f"{where}.{name}[{index}]")
            for index, entry in enumerate(list_of(settings, f"{where}.{name}"))
        )
        for name, settings in data.items()
    }


def _setting_from_json(data: Json, where: str) -> Setting:
    fields = mapping_of(data, where, ("value", "filter"), required=("value",))
    value = fields["value"]
    if isinstance(value, list):
        value = tuple(value)
    elif not isinstance(value, bool | int | float | str):
        raise RecipeError(f"{where}.value: expected a number, boolean, text or list of numbers, got {value!r}")
    return Setting(value, optional_text(fields.get("filter"), f"{where}.filter"))
