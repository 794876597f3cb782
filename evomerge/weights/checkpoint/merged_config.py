"""config.json of a merged model: that of one of its models, with the result's dtype, layers and vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.core import Json
from evomerge.plan.layer_kinds import listed_kinds
from evomerge.plan.model_header import DECODER_KEYS, N_LAYERS_KEYS, language_config
from evomerge.recipe import Recipe
from evomerge.weights.checkpoint.merged_model import MergedModel
from evomerge.weights.checkpoint.vocabulary import Alignment


def merged_config(model: MergedModel) -> dict[str, Json]:
    """The owner's config with the result's dtype, layers and vocabulary."""
    recipe, plan, owner = model.recipe, model.plan, model.owner
    config: dict[str, Any] = {key: value for key, value in owner.config.items() if key != "_name_or_path"}
    if "torch_dtype" not in config:
        config.setdefault("dtype", plan.dtype)
    config = _with_dtype(config, plan.dtype)
    if owner.copied_head is not None:
        config["tie_word_embeddings"] = True
    if model.alignment is not None:
        config = _with_vocabulary(config, model.alignment)
    layers = _layers_of(recipe)
    if not layers:
        return config
    return with_layers(config, [layer for _, layer in layers], [model.headers[key].config for key, _ in layers])


def _with_dtype(config: Mapping[str, Json], dtype: str) -> dict[str, Any]:
    """The config with its dtype replaced everywhere, including nested configs (`text_config`)."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if key.endswith("_config") and isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def _with_vocabulary(config: Mapping[str, Json], alignment: Alignment) -> dict[str, Any]:
    changed: dict[str, Any] = alignment.tokenizer.translated(config)
    if "vocab_size" in changed:
        changed["vocab_size"] = alignment.n_rows
    inner = changed.get("text_config")
    if isinstance(inner, Mapping):
        changed["text_config"] = _with_vocabulary(inner, alignment)
    return changed


def with_layers(
    config: Mapping[str, Json], layers: Sequence[int], sources: Sequence[Mapping[str, Json]] | None = None
) -> dict[str, Json]:
    """`config` for a model with other layers.

    Args:
        config: the config to change.
        layers: for each new layer, its index in the model it comes from.
        sources: for each new layer, the config of that model; None = `config` for all.
    """
    sources = sources or [config] * len(layers)
    changed: dict[str, Any] = dict(config)
    inner = changed.get("text_config")
    if isinstance(inner, Mapping):
        changed["text_config"] = with_layers(inner, layers, list(map(language_config, sources)))
    counts = [key for key in N_LAYERS_KEYS if isinstance(config.get(key), int)]
    if config.get(
        "is_encoder_decoder"
    ):  # the other keys are the encoder's; without a decoder count, T5's decoder has the same depth
        counts = [key for key in counts if key in DECODER_KEYS] or list(DECODER_KEYS[:1])
    changed |= dict.fromkeys(counts, len(layers))
    kinds_of = {id(source): listed_kinds(source) for source in sources}
    for key, own in listed_kinds(config).items():
        # layers of a model that does not list kinds are assumed to have the owner's kind at that index
        changed[key] = [
            kinds_of[id(source)][key][layer] if key in kinds_of[id(source)] else own[min(layer, len(own) - 1)]
            for source, layer in zip(sources, layers, strict=True)
        ]
    return changed


def _layers_of(recipe: Recipe) -> list[tuple[str, int]]:
    """For each layer from slices, the model (the base if it is listed, else the first source) and layer whose config applies."""
    layers: list[tuple[str, int]] = []
    for part in recipe.slices:
        base = recipe.base_of(part)
        chosen = next((source for source in part.sources if source.key == base), part.sources[0])
        layers.extend((chosen.key, layer) for layer in range(*(chosen.layer_range or (0, 0))))
    return layers
