"""mergekit's configuration format -> `Recipe`.

Knows the format; knows nothing of files. Keys that mergekit would ignore silently are errors here.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from evomerge.core import RecipeError
from evomerge.recipe.methods import ParameterSpec, method_spec
from evomerge.recipe.parts import Parameters, Setting, Slice, Source
from evomerge.recipe.recipe import DTYPES, Recipe

_TOP = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "parameters",
)
_UNSUPPORTED_TOP = ("modules", "tokenizer", "chat_template")
_SLICE = ("sources", "base_model", "residual_weight", "parameters")


def recipe_from_mergekit(document: Any, where: str) -> Recipe:
    """The recipe that a parsed mergekit document describes; model paths are left as they are written.

    Args:
        document: one YAML document.
        where: the file's name, for messages.

    Raises:
        RecipeError: an unknown key or one that evomerge does not support, a wrong type, not exactly one of `models` and `slices`.
    """
    fields = _mapping(document, where, _TOP)
    for key in _UNSUPPORTED_TOP:
        if fields.get(key) is not None:
            raise RecipeError(f"{where}: {key!r} is not supported by evomerge; remove it or run mergekit for this file")
    if (fields.get("models") is None) == (fields.get("slices") is None):
        raise RecipeError(f"{where}: give exactly one of 'models' and 'slices'")
    method = _text(fields.get("merge_method"), f"{where}: merge_method")
    spec_of = {spec.name: spec for spec in method_spec(method).parameters}
    base = fields.get("base_model")
    if fields.get("models") is not None:
        slices: tuple[Slice, ...] = (_whole_model(fields["models"], spec_of, f"{where}: models"),)
    else:
        slices = tuple(
            _slice(entry, spec_of, f"{where}: slices[{index}]", base)
            for index, entry in enumerate(_list(fields["slices"], f"{where}: slices"))
        )
    dtype, out_dtype = (_dtype(fields.get(key), f"{where}: {key}") for key in ("dtype", "out_dtype"))
    tokenizer = fields.get("tokenizer_source")
    if tokenizer == "union":
        raise RecipeError(f"{where}: tokenizer_source 'union' is not supported by evomerge; name one of the models")
    return Recipe(
        method=method,
        slices=slices,
        base=None if base is None else _reference(base, f"{where}: base_model").key,
        parameters=_parameters(fields.get("parameters"), spec_of, f"{where}: parameters"),
        dtype=dtype,
        out_dtype=out_dtype or dtype,
        tokenizer_source=None
        if tokenizer is None or tokenizer == "base"
        else _reference(tokenizer, f"{where}: tokenizer_source").key,
    )


def _whole_model(data: Any, spec_of: Mapping[str, ParameterSpec], where: str) -> Slice:
    sources = []
    for index, entry in enumerate(_list(data, where)):
        place = f"{where}[{index}]"
        fields = _mapping(entry, place, ("model", "parameters"))
        reference = _reference(fields.get("model"), f"{place}.model")
        parameters = _parameters(fields.get("parameters"), spec_of, f"{place}.parameters")
        sources.append(Source(reference.model, None, parameters, reference.revision, reference.lora))
    return Slice(tuple(sources))


def _slice(data: Any, spec_of: Mapping[str, ParameterSpec], where: str, base: Any) -> Slice:
    fields = _mapping(data, where, _SLICE)
    if fields.get("base_model") is not None and fields["base_model"] != base:
        raise RecipeError(f"{where}: a base_model of its own for one slice is not supported by evomerge")
    if fields.get("residual_weight") is not None:
        raise RecipeError(f"{where}: residual_weight has no effect in mergekit; remove it")
    sources = []
    for index, entry in enumerate(_list(fields.get("sources"), f"{where}.sources")):
        place = f"{where}.sources[{index}]"
        source = _mapping(entry, place, ("model", "layer_range", "parameters"))
        reference = _reference(source.get("model"), f"{place}.model")
        layers = _list(source.get("layer_range"), f"{place}.layer_range")
        if len(layers) != 2 or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
            raise RecipeError(f"{place}.layer_range: expected [first, last) as two whole numbers, got {layers!r}")
        parameters = _parameters(source.get("parameters"), spec_of, f"{place}.parameters")
        sources.append(Source(reference.model, (layers[0], layers[1]), parameters, reference.revision, reference.lora))
    return Slice(tuple(sources), _parameters(fields.get("parameters"), spec_of, f"{where}.parameters"))


def _reference(data: Any, where: str) -> Source:
    """A model reference (text `path@revision+lora` or mergekit's mapping form) as a source without layers and parameters."""
    if isinstance(data, str) and data:
        model, _, lora = data.partition("+")
        if "+" in lora or model.count("@") > 1 or "@" in lora:
            raise RecipeError(f"{where}: {data!r} is not a model reference 'path[@revision][+lora]'")
        path, _, revision = model.partition("@")
        return Source(path, revision=revision or None, lora=lora or None)
    if isinstance(data, Mapping):
        fields = _mapping(data, where, ("model", "lora", "override_architecture"))
        if fields.get("override_architecture") is not None:
            raise RecipeError(f"{where}: override_architecture is not supported by evomerge")
        path, pinned = _path(fields.get("model"), f"{where}.model")
        adapter = None if fields.get("lora") is None else _path(fields["lora"], f"{where}.lora")[0]
        return Source(path, revision=pinned, lora=adapter)
    raise RecipeError(f"{where}: expected a model path, got {data!r}")


def _path(data: Any, where: str) -> tuple[str, str | None]:
    """Path and revision of `data`: text `path@revision` or a mapping."""
    if isinstance(data, Mapping):
        fields = _mapping(data, where, ("path", "revision"))
        revision: Any = fields.get("revision")
        return _text(fields.get("path"), f"{where}.path"), None if revision is None else _text(
            revision, f"{where}.revision"
        )
    path, _, after = _text(data, where).partition("@")
    return path, after or None


def _parameters(data: Any, spec_of: Mapping[str, ParameterSpec], where: str) -> Parameters:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping of parameters, got {data!r}")
    return {_text(name, where): _settings(value, spec_of.get(name), f"{where}.{name}") for name, value in data.items()}


def _settings(data: Any, spec: ParameterSpec | None, where: str) -> tuple[Setting, ...]:
    if isinstance(data, Mapping):
        return (_conditional(data, spec, where),)
    if isinstance(data, list) and data and all(isinstance(entry, Mapping) for entry in data):
        return tuple(_conditional(entry, spec, f"{where}[{index}]") for index, entry in enumerate(data))
    return (_setting(data, None, spec, where),)


def _conditional(data: Mapping[str, Any], spec: ParameterSpec | None, where: str) -> Setting:
    fields = _mapping(data, where, ("filter", "value"))
    if "value" not in fields:
        raise RecipeError(f"{where}: key 'value' is missing")
    text = fields.get("filter")
    if text is not None and not isinstance(text, str):
        raise RecipeError(f"{where}.filter: expected text, got {text!r}")
    return _setting(fields["value"], text, spec, where)


def _setting(data: Any, text: str | None, spec: ParameterSpec | None, where: str) -> Setting:
    try:
        if isinstance(data, list):
            gradient: Any = tuple(_scalar(entry, spec) for entry in data)
            return Setting(gradient, text)  # which refuses what is no number
        return Setting(_scalar(data, spec), text)
    except RecipeError as problem:
        raise RecipeError(f"{where}: {problem}") from None


def _scalar(data: Any, spec: ParameterSpec | None) -> float | bool | str:
    if not isinstance(data, bool | int | float | str):
        raise RecipeError(f"expected a number, got {data!r}")
    if isinstance(data, str) and spec is not None and not isinstance(spec.default, bool):
        try:  # YAML 1.1 reads 1e-3 as text; mergekit takes it as a number
            return float(data)
        except ValueError:
            raise RecipeError(f"expected a number, got {data!r}") from None
    if isinstance(data, int | float) and spec is not None and isinstance(spec.default, bool) and data in (0, 1):
        return bool(data)
    return data


def _dtype(data: Any, where: str) -> str | None:
    if data is None:
        return None
    name = _text(data, where).removeprefix("torch.")
    if name not in DTYPES:
        raise RecipeError(f"{where}: unknown dtype {data!r}; known: {', '.join(DTYPES)}")
    return name


def _mapping(data: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping with {', '.join(known)}; got {data!r}")
    for key in data:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise RecipeError(f"{where}: unknown key {key!r}{hint}")
    return dict(data)


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise RecipeError(f"{where}: expected a list with at least one entry, got {data!r}")
    return data


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str) or not data:
        raise RecipeError(f"{where}: expected text, got {data!r}")
    return data
