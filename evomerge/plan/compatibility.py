"""Whether models can be merged with each other, from their headers alone."""

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
"""settings, by all their names, that change the meaning of a weight without changing its shape (or explain why shapes differ)

One that a config leaves out is not compared: transformers 4 leaves out defaults, and shapes are checked anyway.
"""


def check_compatible(
    reference: ModelHeader,
    others: Mapping[str, ModelHeader],
    *,
    any_depth: bool = False,
    layers_only: Collection[str] = (),
) -> None:
    """Refuses models that do not fit `reference`; shapes are checked tensor by tensor later.

    Args:
        reference: what the others are compared with.
        others: key -> header.
        any_depth: whether they may have more or fewer layers, each like the reference's.
        layers_only: keys of those that give layers and nothing else, so that their vocabulary may be another.

    Raises:
        RecipeError: other layer counts, vocabularies, heads, rotary embeddings, or an untied model with a tied reference.
        CheckpointError: a tensor too few or too many, or no output layer where the config says that there is one.
    """
    for key, header in {str(reference.folder): reference, **others}.items():
        _check_head(header, key)
    for key, header in others.items():
        _check_config(reference, header, key)
        other_depth = reference.n_layers != header.n_layers
        if other_depth and not any_depth:
            raise RecipeError(
                f"{key} has {header.n_layers} layers, {reference.folder} has {reference.n_layers}; only models of one architecture "
                "can be merged. Layers of models of different depth can be stacked or merged in slices with a layer_range of every model, "
                "the base's too"
            )
        gives_rows = key not in layers_only
        if gives_rows:
            _check_vocabulary(reference, header, key)
        if gives_rows and reference.tied and not header.tied:
            raise RecipeError(
                f"{key} has an output layer of its own ({header.head}), {reference.folder} ties it to the embedding; "
                "merge models of one kind, or take an untied model as the base"
            )
        if other_depth:
            _check_layers(reference, header, key, outside=gives_rows)
        else:
            _check_names(reference, header, key, outside=gives_rows)


def _check_head(header: ModelHeader, key: str) -> None:
    """Only where the name of the missing tensor is certain: in models that are built like Llama."""
    if header.config.get("tie_word_embeddings") is not False or not header.architecture.endswith("ForCausalLM"):
        return
    if header.tied and header.embedding == "model.embed_tokens.weight":
        raise CheckpointError(
            f"{key} has no lm_head.weight, and its config.json says that the output layer is not the embedding "
            "(tie_word_embeddings: false); is its download complete?"
        )


def _check_names(reference: ModelHeader, header: ModelHeader, key: str, *, outside: bool) -> None:
    """Both have the same tensors; unless `outside`, in their layers."""
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
            f"{key} has a tensor {extra[0]!r} and {reference.folder} {missing[0]!r}, {len(missing)} in all: if they are models of one "
            "architecture, save both with one version of transformers, so that names are the same"
        )
    if missing:
        raise CheckpointError(
            f"{key} has no tensor {missing[0]!r}, which {reference.folder} has; is its download complete?"
        )
    if extra:
        raise CheckpointError(
            f"{key} has a tensor {extra[0]!r} that {reference.folder} has not; only models of one architecture can be merged"
        )


def _check_layers(reference: ModelHeader, header: ModelHeader, key: str, *, outside: bool) -> None:
    """As `_check_names`, for another number of layers: all layers of both have the same tensors."""
    wanted = _layers(reference)
    first, *_ = wanted.values()
    for folder, found in ((str(reference.folder), wanted), (key, _layers(header))):
        for layer, rests in found.items():
            if rests != first:
                name = sorted(rests ^ first)[0]
                raise CheckpointError(
                    f"{folder}: layer {layer} differs from the first layer of {reference.folder} in {name!r}; models of different depth "
                    "need layers of one kind"
                )
    if not outside:
        return
    ours = {name for name in reference.tensors if layer_name(name) is None}
    theirs = {name for name in header.tensors if layer_name(name) is None}
    for name in sorted(ours ^ theirs):
        if not (name == reference.head and header.tied):
            raise CheckpointError(f"{name!r} is a tensor of only one of {key} and {reference.folder}")


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
            "(added tokens or padding); a recipe file can join vocabularies (`tokenizer: {source: union}`), a search cannot: "
            "`evomerge align` gives the models one vocabulary"
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
        "models that differ in it do not share the meaning of their weights"
    )


def _head_dim(header: ModelHeader) -> int | None:
    """The rows of one head, where the config does not say it and the queries are a plain matrix."""
    heads = config_value(header.config, *_HEADS)
    queries = next(
        (tensor for name, tensor in header.tensors.items() if name.endswith("self_attn.q_proj.weight")), None
    )
    if not isinstance(heads, int) or heads < 1 or queries is None or "qk_rope_head_dim" in header.config:
        return None
    return queries.shape[0] // heads
