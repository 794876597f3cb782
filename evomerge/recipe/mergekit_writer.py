"""`Recipe` -> a document that mergekit reads as the same merge.

Pieces along the flattened weights become a `linear` merge with filters. Whatever cannot be expressed in mergekit's format and
our additions to it is left out; `files.write_recipe` stores it next to the document.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

from evomerge.recipe.mergekit_fields import reference_of
from evomerge.recipe.mergekit_tokenizer import write_tokenizer
from evomerge.recipe.methods import SHIFTED_LINEAR, BaseRole, method_spec
from evomerge.recipe.parts import Parameters, Setting, Slice, Source, joined
from evomerge.recipe.pieces import PieceTable
from evomerge.recipe.recipe import Recipe


def recipe_to_mergekit(recipe: Recipe) -> dict[str, Any]:
    """The document, as plain dicts and lists in mergekit's usual key order.

    mergekit requires a method's base among the sources of every slice, and computes in the sources' dtype by default, so
    both are written out.
    """
    if recipe.pieces is not None:
        recipe = _as_linear(recipe, recipe.pieces)
    document: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.base is not None:
        document["base_model"] = reference_of(recipe.source(recipe.base))
    parameters = recipe.parameters
    modules = recipe.modules()
    if None not in modules:
        document["modules"] = {str(name): _module(recipe, parts) for name, parts in modules.items()}
    elif recipe.whole_model:
        part = recipe.slices[0]
        document["models"] = [_entry(source) for source in part.sources]
        # the models form has no slice level: put the slice's settings, which have priority, before the global ones
        parameters = joined(part.parameters, recipe.parameters)
    else:
        document["slices"] = _slices(recipe, recipe.slices)
    document |= _optional("parameters", _parameters(parameters))
    if recipe.dtype is not None or recipe.out_dtype is not None:
        document["dtype"] = recipe.dtype or "float32"
    document |= _optional("out_dtype", recipe.out_dtype)
    if recipe.tokenizer is not None:
        document |= write_tokenizer(recipe.tokenizer, {key: recipe.source(key) for key in recipe.models()})
    document |= _optional("chat_template", recipe.chat_template)
    # mergekit ignores it; it is left out if it is the default or if the method does not need it
    is_needed = recipe.seed and not method_spec(recipe.method).deterministic
    return document | _optional("random_seed", recipe.seed if is_needed else None)


def has_mergekit_form(recipe: Recipe) -> bool:
    """Whether mergekit can express the merge: it cannot split a tensor, add noise or shift weights."""
    if recipe.method == SHIFTED_LINEAR.name:
        return False
    return recipe.pieces is None or not (recipe.pieces.splits_tensors or recipe.pieces.noise)


def mergekit_remark(recipe: Recipe) -> str | None:
    """A remark for users who give the recipe's file to mergekit; None = none needed."""
    if not has_mergekit_form(recipe):
        return "mergekit cannot express this merge: use `evomerge merge` on the file"
    if any(recipe.source(key).lora for key in recipe.models()):
        return "mergekit merges LoRA adapters only with --lora-merge-cache FOLDER"
    return None


def _as_linear(recipe: Recipe, pieces: PieceTable) -> Recipe:
    """A `linear` merge with weights by tensor name, equivalent to pieces that end at tensor boundaries."""
    row_of = {name: spans[0].row for name, spans in pieces.tensors.items()}
    common = Counter(row_of.values()).most_common(1)[0][0]
    special = [name for name, row in row_of.items() if pieces.rows[row] != pieces.rows[common]]
    # filters are substrings and the first match wins, so a name that contains another one must come before it
    named = sorted({name for text in special for name in row_of if text in name}, key=lambda name: (-len(name), name))
    sources = tuple(
        replace(
            source,
            parameters={
                "weight": (
                    *(Setting(pieces.rows[row_of[name]][index], name) for name in named),
                    Setting(pieces.rows[common][index]),
                )
            },
        )
        for index, source in enumerate(recipe.slices[0].sources)
    )
    return replace(
        recipe,
        method="linear",
        slices=(Slice(sources),),
        parameters={"normalize": (Setting(False),)},
        pieces=None,
    )


def _module(recipe: Recipe, parts: tuple[Slice, ...]) -> dict[str, Any]:
    if parts[0].sources[0].layer_range is not None:
        return {"slices": _slices(recipe, parts)}
    models = [_entry(source) for source in parts[0].sources]
    return {"models": models} | _optional("parameters", _parameters(parts[0].parameters))


def _slices(recipe: Recipe, parts: tuple[Slice, ...]) -> list[dict[str, Any]]:
    return [
        {"sources": [_entry(source) for source in _with_base(recipe, part)]}
        | _optional("base_model", None if part.base is None else reference_of(recipe.source(part.base)))
        | _optional("parameters", _parameters(part.parameters))
        for part in parts
    ]


def _with_base(recipe: Recipe, part: Slice) -> tuple[Source, ...]:
    base, sources = recipe.base_of(part), part.sources
    if base is None or method_spec(recipe.method).base is BaseRole.SOURCE:
        return sources
    if any(source.key == base for source in sources):
        return sources
    return (*sources, Source(base, sources[0].layer_range))


def _entry(source: Source) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": reference_of(source)}
    if source.layer_range is not None:
        entry["layer_range"] = list(source.layer_range)
    return entry | _optional("parameters", _parameters(source.parameters))


def _parameters(parameters: Parameters) -> dict[str, Any]:
    return {name: _settings(settings) for name, settings in parameters.items()}


def _settings(settings: tuple[Setting, ...]) -> Any:
    if len(settings) == 1 and settings[0].filter is None:
        return _value(settings[0])
    return [_optional("filter", setting.filter) | {"value": _value(setting)} for setting in settings]


def _value(setting: Setting) -> Any:
    return list(setting.value) if isinstance(setting.value, tuple) else setting.value


def _optional(key: str, value: Any) -> dict[str, Any]:
    return {} if value is None or value == {} else {key: value}
