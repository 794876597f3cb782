"""Module groups match the tensor names of every kind of model; groups without tensors are refused, and the error lists those that exist."""

from collections import Counter

import pytest

from evomerge.core import SpaceError
from evomerge.recipe import group_of, module_filters

LLAMA = [
    "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.weight", "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.up_proj.weight", "model.norm.weight",
]  # fmt: skip
NEOX = [
    "gpt_neox.embed_in.weight", "gpt_neox.layers.0.attention.query_key_value.weight", "gpt_neox.layers.0.attention.dense.bias",
    "gpt_neox.layers.0.input_layernorm.weight", "gpt_neox.layers.0.post_attention_layernorm.bias",
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "gpt_neox.final_layer_norm.weight", "embed_out.weight",
]  # fmt: skip
GPT2 = [
    "wte.weight",
    "wpe.weight",
    "h.0.ln_1.weight",
    "h.0.attn.c_attn.weight",
    "h.0.ln_2.weight",
    "h.0.mlp.c_fc.weight",
    "ln_f.weight",
]
MIXTRAL = [
    *LLAMA[:5],
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    LLAMA[-1],
    "lm_head.weight",
]
LFM2 = [
    "model.embed_tokens.weight", "model.layers.0.conv.in_proj.weight", "model.layers.0.operator_norm.weight",
    "model.layers.0.feed_forward.w1.weight", "model.layers.1.self_attn.q_layernorm.weight", "model.embedding_norm.weight",
]  # fmt: skip
BLOOM = [
    "transformer.word_embeddings.weight", "transformer.word_embeddings_layernorm.weight",
    "transformer.h.0.self_attention.query_key_value.weight", "transformer.h.0.mlp.dense_h_to_4h.weight", "transformer.ln_f.weight",
]  # fmt: skip
OPT = [
    "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "model.decoder.layers.0.self_attn.k_proj.weight",
    "model.decoder.layers.0.self_attn_layer_norm.weight", "model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc2.bias",
]  # fmt: skip
ALL = ("attention", "mlp", "embeddings", "norms")


@pytest.mark.parametrize(
    ("tensors", "sizes"),
    [(LLAMA, (2, 1, 1, 3)), (NEOX, (2, 1, 2, 3)), (GPT2, (1, 1, 2, 3)), (MIXTRAL, (2, 2, 2, 3)), (BLOOM, (1, 1, 1, 2)), (OPT, (1, 2, 2, 1))],
    ids=["llama", "neox", "gpt2", "mixtral", "bloom", "opt"],
)  # fmt: skip
def test_every_tensor_is_in_its_group(tensors, sizes):
    filters = module_filters(ALL, tensors)
    assert Counter(group_of(name, filters) for name in tensors) == dict(zip(ALL, sizes, strict=True))
    norms = [name for name in tensors if group_of(name, filters) == "norms"]
    assert all("norm" in name or "ln_" in name for name in norms)


def test_layers_of_unknown_kinds_belong_to_the_rest():
    filters = module_filters((*ALL, "rest"), LFM2)
    assert [name for name in LFM2 if group_of(name, filters) == "rest"] == ["model.layers.0.conv.in_proj.weight"]
    assert [name for name in LFM2 if group_of(name, filters) == "embeddings"] == ["model.embed_tokens.weight"]


def test_only_needed_filters_are_returned():
    assert module_filters(("attention", "mlp", "rest"), LLAMA) == {
        "attention": ("attn.",),
        "mlp": ("mlp.",),
        "rest": (),
    }
    assert module_filters(("mlp", "rest"), MIXTRAL)["mlp"] == ("moe.",)
    assert module_filters((), LLAMA) == {}


MAMBA = ["backbone.embeddings.weight", "backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.norm.weight"]


@pytest.mark.parametrize(
    ("groups", "tensors", "message"),
    [
        (("attention", "rest"), MAMBA, r"are left for 'attention'.*the models have embeddings, norms\)"),
        ((*ALL, "rest"), LLAMA, r"are left for 'rest'.*the models have attention, mlp, embeddings, norms\)"),
        (("attention", "mlp"), LLAMA, "must end with 'rest'.*'model.embed_tokens.weight' does not"),
        (("rest", "mlp"), LLAMA, "put it last"),
        (("mlp", "mlp", "rest"), LLAMA, "appears twice"),
        (("atention", "rest"), LLAMA, r"unknown \['atention'\]; known: attention, mlp"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, tensors, message):
    with pytest.raises(SpaceError, match=message):
        module_filters(groups, tensors)
