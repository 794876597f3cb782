"""mergekit's configuration format -> `Recipe`.

Knows the format, but nothing of files. Keys and parameters that mergekit does not know and would silently ignore are errors here; those that
it knows but ignores in their position, which many published recipes contain, are dropped with a warning.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evomerge.core import RecipeError
from evomerge.recipe.mergekit_fields import PARAMETERS, fields_of, model_reference
from evomerge.recipe.mergekit_tokenizer import read_tokenizer
from evomerge.recipe.methods import METHODS, BaseRole, MethodSpec, ParameterSpec, Scope, method_spec
from evomerge.recipe.parts import Parameters, Setting, Slice, Source, joined
from evomerge.recipe.recipe import DTYPES, Recipe
from evomerge.recipe.values import layer_range_of, list_of, mapping_of, optional_text, text_of, whole_number

logger = logging.getLogger(__name__)

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
    "random_seed",
)
_SLICE = ("sources", "base_model", "residual_weight", "parameters")
_FORMS = ("models", "slices", "modules")

_SWITCHES = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)
"""texts that mergekit accepts for a boolean, in upper or lower case"""

_RETIRED = ("embed_slerp", "consensus_method")
"""parameters of earlier versions of mergekit"""

_ONLY_MODULE = "default"
"""mergekit's name for the one module of a plain language model"""


@dataclass(frozen=True, slots=True)
class _Reading:
    """The method of a document, and the keys of the document that mergekit ignores."""

    spec: MethodSpec
    ignored: list[str] = field(default_factory=list)


def recipe_from_mergekit(document: Any, where: str) -> Recipe:
    """The recipe that a parsed mergekit document describes; model paths are left unchanged.

    `random_seed`, which mergekit takes only on its command line, is the recipe's seed.

    Args:
        document: one YAML document.
        where: the file's name, for messages.

    Raises:
        RecipeError: a key is unknown or not supported by evomerge, a value has the wrong type, or there is not exactly one of `models`,
            `slices` and `modules`.
    """
    if isinstance(document, dict) and ("merge_method" not in document or "experts" in document):
        _refuse_other_kinds(document, where)
    fields = fields_of(document, where, _TOP)
    given = [form for form in _FORMS if fields.get(form) is not None]
    if len(given) != 1:
        raise RecipeError(f"{where}: give exactly one of 'models', 'slices' and 'modules'")
    if fields.get("merge_method") is None:
        raise RecipeError(f"{where}: key 'merge_method' is missing; known methods: {', '.join(sorted(METHODS))}")
    method = text_of(fields["merge_method"], f"{where}: merge_method")
    reading = _Reading(method_spec(method))
    owner = None
    if fields.get("base_model") is not None:
        owner = model_reference(fields["base_model"], f"{where}: base_model")
    base = None if owner is None else owner.key
    if given == ["modules"]:
        slices = _modules(fields["modules"], reading, f"{where}: modules")
    else:
        slices = _slices(fields, reading, f"{where}: ")
    dtype, out_dtype = (_dtype(fields.get(key), f"{where}: {key}") for key in ("dtype", "out_dtype"))
    seed = fields.get("random_seed")
    parameters = _parameters(fields.get("parameters"), reading, f"{where}: parameters")
    if owner is not None and owner.key != owner.model:
        slices, base = _with_base(slices, owner, parameters, reading.spec, where)
    if reading.ignored:
        places = ", ".join(place.removeprefix(f"{where}: ") for place in reading.ignored)
        logger.warning("%s: without effect with merge method %r, as in mergekit: %s", where, method, places)
    return Recipe(
        method=method,
        slices=slices,
        base=base,
        parameters=parameters,
        dtype=dtype,
        out_dtype=out_dtype or dtype,
        seed=0 if seed is None else whole_number(seed, f"{where}: random_seed", least=0),
        tokenizer=read_tokenizer(fields, where),
        chat_template=optional_text(fields.get("chat_template"), f"{where}: chat_template"),
    )


def _refuse_other_kinds(document: Mapping[str, Any], where: str) -> None:
    """Refuse other kinds of files that are easily mistaken for recipes."""
    if "genome" in document:
        raise RecipeError(
            f"{where}: is a configuration of mergekit-evolve; `evomerge init --mergekit-evolve` converts it to a search configuration"
        )
    models = document.get("models")
    if "tasks" in document or (isinstance(models, Mapping) and "experts" in models):
        raise RecipeError(
            f"{where}: is a search configuration, not a recipe; `evomerge export` writes a recipe from a run"
        )
    if "experts" in document:
        raise RecipeError(
            f"{where}: is a configuration of mergekit-moe; evomerge does not build mixtures of experts from dense models"
        )


def _with_base(
    slices: tuple[Slice, ...], base: Source, parameters: Parameters, spec: MethodSpec, where: str
) -> tuple[tuple[Slice, ...], str]:
    """The slices and the key of their base, for a base with a revision or an adapter, which must therefore be listed among the sources."""
    if spec.base is BaseRole.SOURCE and not any(spec.appends_base(part, parameters) for part in slices):
        if any(source.key == base.key for part in slices for source in part.sources):
            return slices, base.key
        if base.revision is None:
            return slices, base.model  # only its config and tokenizer are used, which an adapter does not change
    return tuple(_with_listed_base(part, base, where) if part.base is None else part for part in slices), base.key


def _with_listed_base(part: Slice, base: Source, where: str) -> Slice:
    """The slice with such a base among its sources; in whole-model merges the base is a source anyway, as in mergekit."""
    if any(source.key == base.key for source in part.sources):
        return part
    if part.sources[0].layer_range is None:
        return replace(part, sources=(*part.sources, base))
    raise RecipeError(
        f"{where}: base_model {base.key} has a revision or an adapter, so it must also be listed among the sources of every slice, with its layer_range"
    )


def _modules(data: Any, reading: _Reading, where: str) -> tuple[Slice, ...]:
    """The slices of every module. A module's parameters have lower priority than those of its slices, so they are appended to them."""
    if not isinstance(data, Mapping) or not data:
        raise RecipeError(f"{where}: expected a mapping of modules, got {data!r}")
    slices: list[Slice] = []
    for name, entry in data.items():
        place = f"{where}.{name}"
        fields = fields_of(entry, place, ("models", "slices", "parameters"))
        if (fields.get("models") is None) == (fields.get("slices") is None):
            raise RecipeError(f"{place}: give exactly one of 'models' and 'slices'")
        own = _parameters(fields.get("parameters"), reading, f"{place}.parameters")
        module = None if name == _ONLY_MODULE else text_of(name, where)
        slices += [
            replace(part, parameters=joined(part.parameters, own), module=module)
            for part in _slices(fields, reading, f"{place}.")
        ]
    return tuple(slices)


def _slices(fields: Mapping[str, Any], reading: _Reading, where: str) -> tuple[Slice, ...]:
    """The slices of a document's or a module's `models` or `slices`."""
    if fields.get("models") is not None:
        return (_whole_model(fields["models"], reading, f"{where}models"),)
    return tuple(
        _slice(entry, reading, f"{where}slices[{index}]")
        for index, entry in enumerate(list_of(fields["slices"], f"{where}slices", least=1))
    )


def _whole_model(data: Any, reading: _Reading, where: str) -> Slice:
    entries = enumerate(list_of(data, where, least=1))
    return Slice(tuple(_source(entry, reading, f"{where}[{index}]") for index, entry in entries))


def _slice(data: Any, reading: _Reading, where: str) -> Slice:
    fields = fields_of(data, where, _SLICE)
    if fields.get("residual_weight") is not None:
        reading.ignored.append(f"{where}.residual_weight")
    entries = enumerate(list_of(fields.get("sources"), f"{where}.sources", least=1))
    sources = tuple(_source(entry, reading, f"{where}.sources[{index}]", layers=True) for index, entry in entries)
    part = Slice(sources, _parameters(fields.get("parameters"), reading, f"{where}.parameters"))
    if fields.get("base_model") is None:
        return part
    base = model_reference(fields["base_model"], f"{where}.base_model")
    if base.key == base.model:
        return replace(part, base=base.key)
    (part,), key = _with_base((part,), base, {}, reading.spec, where)
    return replace(part, base=key)


def _source(data: Any, reading: _Reading, where: str, *, layers: bool = False) -> Source:
    """A model, or with `layers` a range of its layers."""
    fields = fields_of(data, where, ("model", "layer_range", "parameters") if layers else ("model", "parameters"))
    if layers and fields.get("layer_range") is None:
        raise RecipeError(
            f"{where}: layer_range is missing: give [first, last) layers, or list whole models under `models`"
        )
    return replace(
        model_reference(fields.get("model"), f"{where}.model"),
        layer_range=layer_range_of(fields["layer_range"], f"{where}.layer_range") if layers else None,
        parameters=_parameters(fields.get("parameters"), reading, f"{where}.parameters", on_source=True),
    )


def _parameters(data: Any, reading: _Reading, where: str, *, on_source: bool = False) -> Parameters:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping of parameters, got {data!r}")
    parameters: dict[str, tuple[Setting, ...]] = {}
    for name, value in data.items():
        spec = _known(name, reading.spec, where)
        if spec is None or (on_source and spec.scope is Scope.GLOBAL):
            reading.ignored.append(f"{where}.{name}")
        else:
            parameters[name] = _settings(value, spec, f"{where}.{name}")
    return parameters


def _known(name: Any, method: MethodSpec, where: str) -> ParameterSpec | None:
    """The method's parameter called `name`; None if mergekit ignores it: a parameter of other methods or of earlier versions, or a document key."""
    try:
        return method.known_parameter(str(name))
    except RecipeError as problem:
        if name in PARAMETERS or name in _TOP or name in _RETIRED:
            return None
        raise RecipeError(f"{where}: {problem}; mergekit would ignore it: correct or remove it") from None


def _settings(data: Any, spec: ParameterSpec, where: str) -> tuple[Setting, ...]:
    if isinstance(data, Mapping):
        return (_conditional(data, spec, where),)
    if isinstance(data, list) and data and all(isinstance(entry, Mapping) for entry in data):
        return tuple(_conditional(entry, spec, f"{where}[{index}]") for index, entry in enumerate(data))
    return (_setting(data, None, spec, where),)


def _conditional(data: Mapping[str, Any], spec: ParameterSpec, where: str) -> Setting:
    fields = mapping_of(data, where, ("filter", "value"), required=("value",))
    text = fields.get("filter")
    if text is not None and not isinstance(text, str):
        raise RecipeError(f"{where}.filter: expected text, got {text!r}")
    return _setting(fields["value"], text, spec, where)


def _setting(data: Any, text: str | None, spec: ParameterSpec, where: str) -> Setting:
    try:
        if isinstance(data, list):
            gradient: Any = tuple(_scalar(entry, spec) for entry in data)
            return Setting(gradient, text)  # refuses entries that are not numbers
        return Setting(_scalar(data, spec), text)
    except RecipeError as problem:
        raise RecipeError(f"{where}: {problem}") from None


def _scalar(data: Any, spec: ParameterSpec) -> float | bool | str:
    if not isinstance(data, bool | int | float | str):
        raise RecipeError(f"expected a number, got {data!r}")
    if isinstance(data, str):
        if isinstance(spec.default, bool):
            return _SWITCHES.get(data.lower(), data)  # `check_recipe` refuses anything else
        try:  # YAML 1.1 reads 1e-3 as text; mergekit accepts it as a number
            return float(data)
        except ValueError:
            raise RecipeError(f"expected a number, got {data!r}") from None
    if isinstance(spec.default, bool) and data in (0, 1):
        return bool(data)
    return data


def _dtype(data: Any, where: str) -> str | None:
    if data is None:
        return None
    name = text_of(data, where).removeprefix("torch.")
    if name not in DTYPES:
        raise RecipeError(f"{where}: unknown dtype {data!r}; known: {', '.join(DTYPES)}")
    return name
