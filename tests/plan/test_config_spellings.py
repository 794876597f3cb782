"""Configs written by transformers 4 and 5 for the same model are compatible; those of different models are not."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from evomerge.core import RecipeError
from evomerge.plan import read_model_header
from evomerge.plan.compatibility import check_compatible
from evomerge.testing.tiny_models import write_tiny_llama

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OLD = {
    "llama": {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
    "qwen2": {"rope_theta": 10000.0, "rope_scaling": None, "use_sliding_window": False, "max_window_layers": 28, "torch_dtype": "float16"},
    "mixtral": {"rope_theta": 1e6, "num_key_value_heads": 8},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_scaling": None},
    "phi": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "stablelm": {"rope_theta": 10000, "partial_rotary_factor": 0.25},
    "gemma3_text": {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": None, "sliding_window_pattern": 6, "head_dim": 256},
    "olmo3": {"rope_theta": 500000.0, "rope_scaling": None},
    "deepseek_v3": {"rope_theta": 10000.0, "rope_scaling": None, "qk_rope_head_dim": 64, "num_key_value_heads": 128},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "torch_dtype": "float32"},
}  # fmt: skip
"""model type -> what transformers 4 writes of its defaults"""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    return read_model_header(write_tiny_llama(tmp_path_factory.mktemp("models") / "m", seed=0))


def check(header, one, other):
    """Checks in both directions."""
    for first, second in ((one, other), (other, one)):
        check_compatible(
            dataclasses.replace(header, config=first), {"other": dataclasses.replace(header, config=second)}
        )


def saved_by_5(kind, **settings):
    return json.loads(AutoConfig.for_model(kind, **SIZES | settings).to_json_string(use_diff=False))


@pytest.mark.parametrize("kind", OLD)
def test_both_spellings_of_one_model_are_compatible(header, kind):
    old = SIZES | OLD[kind] | {"model_type": kind}
    new = saved_by_5(kind)
    assert any(key not in new for key in OLD[kind]), "the spellings must differ"
    check(header, old, new)
    if "n_head" in old:
        with pytest.raises(RecipeError, match="num_attention_heads = "):
            check(header, old | {"n_head": 8, "num_attention_heads": None}, new)


@pytest.mark.parametrize(
    ("kind", "changes", "part"),
    [
        ("llama", {"rope_theta": 500000.0}, "'rope_theta': 500000.0"),
        ("llama", {"rope_scaling": LLAMA3}, "'rope_type': 'llama3'"),
        ("gpt_neox", {"rotary_emb_base": 500000}, "rope = "),
        ("gpt_neox", {"rotary_pct": 0.5}, "'partial_rotary_factor': 0.5"),
        ("phi", {"partial_rotary_factor": 0.4}, "'partial_rotary_factor': 0.4"),
        ("gemma3_text", {"rope_theta": 10000.0}, "rope = "),
        ("gemma3_text", {"rope_local_base_freq": 20000.0}, "20000.0"),
        ("olmo3", {"rope_theta": 10000.0}, "10000.0"),
    ],
)
def test_different_rope_is_refused_in_either_spelling(header, kind, changes, part):
    with pytest.raises(RecipeError, match=part):
        check(header, SIZES | OLD[kind] | {"model_type": kind} | changes, saved_by_5(kind))


def test_old_name_of_longrope_is_recognised(header):
    """Phi-3 originally called it `su`."""
    factors = {"long_factor": [1.0, 2.0], "short_factor": [1.0, 1.5]}
    one, other = ({"rope_scaling": {"type": name, **factors}, "model_type": "phi3"} for name in ("su", "longrope"))
    check(header, SIZES | one, SIZES | other)
    with pytest.raises(RecipeError, match="rope = "):
        check(header, SIZES | one, SIZES | {"rope_scaling": {"type": "linear", **factors}, "model_type": "phi3"})


def test_invalid_rope_type_counts_as_a_different_rope(header):
    """A config from an unknown author may contain anything."""
    odd = SIZES | OLD["llama"] | {"model_type": "llama", "rope_scaling": {"type": ["linear"]}}
    check(header, odd, odd)
    with pytest.raises(RecipeError, match="rope = "):
        check(header, odd, saved_by_5("llama"))


def test_scaled_rope_is_compatible_in_both_spellings(header):
    old = SIZES | OLD["llama"] | {"model_type": "llama", "rope_scaling": {**LLAMA3, "factor": 8, "type": "llama3"}}
    check(header, old, saved_by_5("llama", rope_parameters={**LLAMA3, "rope_theta": 10000.0}))
    other = saved_by_5("llama", rope_parameters={**LLAMA3, "rope_theta": 10000.0, "factor": 32.0})
    with pytest.raises(RecipeError, match="'factor'"):
        check(header, old, other)


def test_defaults_omitted_by_transformers_4_in_a_sub_config_are_filled_in(header):
    """As in the config of Gemma 3 with images, which omits sizes equal to the class's defaults."""
    part = {
        "hidden_size": 32,
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    old = {"model_type": "gemma3", "text_config": part, "torch_dtype": "bfloat16"}
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    new = saved_by_5("gemma3", text_config={"hidden_size": 32, "num_hidden_layers": 2, "rope_parameters": rope})
    check(header, old, new)
    unscaled = saved_by_5("gemma3", text_config={"hidden_size": 32, "num_hidden_layers": 2})
    with pytest.raises(RecipeError, match="rope = "):
        check(header, old, unscaled)


def test_head_size_given_in_only_one_config_is_compared(header):
    config = SIZES | {"model_type": "llama", "num_key_value_heads": 2}
    check(header, config, config | {"head_dim": 8})
    with pytest.raises(RecipeError, match="head_dim = "):
        check(header, config | {"head_dim": 16}, config)
