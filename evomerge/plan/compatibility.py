"""Checks that models can be merged with each other, from their headers alone."""

from collections.abc import Collection, Mapping
from typing import Any

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan.layers import layer_name
from evomerge.plan.model_header import ModelHeader, config_value
from evomerge.plan.rope import rope_of, same_rope

_HEADS = ("num_attention_heads", "n_head", "n_heads")

_SAME_CONFIG = (
    ("model_type",),
    ("hidden_size", "n_embd", "d_model"),
    _HEADS,
    ("num_key_value_heads",),
    ("head_dim",),
    ("rotary_dim",),
)
"""settings (with all their spellings) that change the meaning of weights without changing shapes, or that explain why shapes differ

A setting is compared only if both configs contain it: transformers 4 omits defaults, and shapes are checked anyway.
"""


def check_compatible(
    reference: ModelHeader,
    others: Mapping[str, ModelHeader],
    *,
    any_depth: bool = False,
    layers_only: Collection[str] = (),
) -> None:
    """Refuse models that do not fit `reference`; shapes are checked tensor by tensor later.

    Args:
        reference: the model with which the others are compared.
        others: key -> header.
        any_depth: allow models with more or fewer layers, each like the reference's.
        layers_only: keys of models that contribute only layers, so that their vocabulary may differ.

    Raises:
        RecipeError: numbers of layers, vocabularies, heads or rotary embeddings differ, or a model is untied and the reference is tied.
        CheckpointError: a tensor is missing or unexpected, or the output layer is missing although the config says that it is untied.
    """
    for key, header in {str(reference.folder): reference, **others}.items():
        _check_head(header, key)
    for key, header in others.items():
        _check_config(reference, header, key)
        other_depth = reference.n_layers != header.n_layers
        if other_depth and not any_depth:
            raise RecipeError(
                f"{key} has {header.n_layers} layers, {reference.folder} has {reference.n_layers}; only models of the same architecture "
                "can be merged. To combine models of different depth, stack their layers, or merge slices with a layer_range for every model, "
                "including the base"
            )
        gives_rows = key not in layers_only
        if gives_rows:
            _check_vocabulary(reference, header, key)
        if gives_rows and reference.tied and not header.tied:
            raise RecipeError(
                f"{key} has a separate output layer ({header.head}), {reference.folder} ties it to the embedding; "
                "merge models of one kind, or use an untied model as the base"
            )
        if other_depth:
            _check_layers(reference, header, key, outside=gives_rows)
        else:
            _check_names(reference, header, key, outside=gives_rows)


def _check_head(header: ModelHeader, key: str) -> None:
    """Check that an untied model has its output layer, if the tensor's name is certain, that is, for models built like Llama."""
    if header.config.get("tie_word_embeddings") is not False or not header.architecture.endswith("ForCausalLM"):
        return
    if header.tied and header.embedding == "model.embed_tokens.weight":
        raise CheckpointError(
            f"{key} has no lm_head.weight, but its config.json says that the output layer is not tied to the embedding "
            "(tie_word_embeddings: false); is its download complete?"
        )


def _check_names(reference: ModelHeader, header: ModelHeader, key: str, *, outside: bool) -> None:
    """Check that both have the same tensors; without `outside`, only in their layers."""
    missing = [
        name
        for name in reference.tensors
        if name not in header.tensors and not (name == reference.head and header.tied)
    ]
    extra = [name for name in header.tensors if name not in reference.tensors]
    if not outside:
        missing, extra = ([name for name in names if layer_name(name) is not None] for names in (missing, extra))
    if missing and len(missing) == len(extra):
        raise CheckpointError(
            f"{key} has a tensor {extra[0]!r} where {reference.folder} has {missing[0]!r} ({len(missing)} such differences): if the "
            "models have the same architecture, save both with the same version of transformers, so that their names agree"
        )
    if missing:
        raise CheckpointError(
            f"{key} has no tensor {missing[0]!r}, which {reference.folder} has; is its download complete?"
        )
    if extra:
        raise CheckpointError(
            f"{key} has a tensor {extra[0]!r} that {reference.folder} lacks; only models of the same architecture can be merged"
        )


def _check_layers(reference: ModelHeader, header: ModelHeader, key: str, *, outside: bool) -> None:
    """Like `_check_names`, for different numbers of layers: checks that all layers of both have the same tensors."""
    wanted = _layers(reference)
    first, *_ = wanted.values()
    for folder, found in ((str(reference.folder), wanted), (key, _layers(header))):
        for layer, rests in found.items():
            if rests != first:
                name = sorted(rests ^ first)[0]
                raise CheckpointError(
                    f"{folder}: layer {layer} differs from the first layer of {reference.folder} in {name!r}; in models of different depth "
                    "all layers must be of one kind"
                )
    if not outside:
        return
    ours = {name for name in reference.tensors if layer_name(name) is None}
    theirs = {name for name in header.tensors if layer_name(name) is None}
    for name in sorted(ours ^ theirs):
        if not (name == reference.head and header.tied):
            raise CheckpointError(f"only one of {key} and {reference.folder} has the tensor {name!r}")


def _layers(header: ModelHeader) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for name in header.tensors:
        layer = layer_name(name)
        if layer is not None:
            found.setdefault(layer.index, set()).add(f"{layer.stack}.*.{layer.rest}")
    return found


def _check_vocabulary(reference: ModelHeader, header: ModelHeader, key: str) -> None:
    if None not in (reference.vocab_size, header.vocab_size) and reference.vocab_size != header.vocab_size:
        raise RecipeError(
            f"{key} has {header.vocab_size} embedding rows, {reference.folder} has {reference.vocab_size} "
            "(added tokens or padding); a recipe file can join vocabularies (`tokenizer: {source: union}`), a search cannot: use "
            "`evomerge align` to give the models one vocabulary"
        )


def _check_config(reference: ModelHeader, header: ModelHeader, key: str) -> None:
    for names in _SAME_CONFIG:
        ours, theirs = config_value(reference.config, *names), config_value(header.config, *names)
        if "head_dim" in names:
            ours, theirs = ours or _head_dim(reference), theirs or _head_dim(header)
        if None not in (ours, theirs) and ours != theirs:
            raise _other_config(reference, key, names[0], ours, theirs)
    ours, theirs = rope_of(reference.config), rope_of(header.config)
    if not same_rope(ours, theirs):
        raise _other_config(reference, key, "rope", ours.get("", ours), theirs.get("", theirs))


def _other_config(reference: ModelHeader, key: str, name: str, ours: Any, theirs: Any) -> RecipeError:
    return RecipeError(
        f"{key}: config.json has {name} = {theirs!r}, {reference.folder} has {ours!r}; "
        "weights of models that differ in this setting have different meanings"
    )


def _head_dim(header: ModelHeader) -> int | None:
    """Rows per head, inferred from the query projection if that is a plain matrix; None otherwise."""
    heads = config_value(header.config, *_HEADS)
    queries = next(
        (tensor for name, tensor in header.tensors.items() if name.endswith("self_attn.q_proj.weight")), None
    )
    if not isinstance(heads, int) or heads < 1 or queries is None or "qk_rope_head_dim" in header.config:
        return None
    return queries.shape[0] // heads
