"""Slices of models with several kinds of layers: the config follows the layers, or the recipe is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import make_plan, read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import merge_to_folder

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
WEIGHT = {"weight": (Setting(0.5),)}


def written(folder: Path, kind: str, seed: int = 0, **settings: object) -> str:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | settings))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    model.save_pretrained(folder)
    return str(folder)


def configure(folder: str, **changes: object) -> None:
    """Changes settings; None removes a setting."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def stacked(*pieces: tuple[str, int, int]) -> Recipe:
    return Recipe("passthrough", tuple(Slice((Source(model, (first, end)),)) for model, first, end in pieces))


def averaged(one: tuple[str, int, int], other: tuple[str, int, int], base: str | None = None) -> Recipe:
    sources = tuple(Source(model, (first, end), WEIGHT) for model, first, end in (one, other))
    return Recipe("linear" if base is None else "task_arithmetic", (Slice(sources),), base)


def plan_of(recipe: Recipe):
    return make_plan(recipe, {model: read_model_header(model) for model in recipe.models()})


LFM2 = {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_ff_dim": 64}


def test_stacking_layers_of_two_kinds_updates_the_config(tmp_path):
    folder = written(tmp_path / "m", "lfm2", **LFM2)
    merge_to_folder(stacked((folder, 0, 2), (folder, 1, 3)), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.layer_types == ["conv", "full_attention", "full_attention", "conv"]
    stored, merged = load_file(Path(folder) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for layer, origin in enumerate([0, 1, 1, 2]):
        names = [name for name in stored if name.startswith(f"model.layers.{origin}.")]
        assert names
        for name in names:
            assert torch.equal(merged[name.replace(f".{origin}.", f".{layer}.", 1)], stored[name])


def test_layers_with_different_tensors_are_not_merged(tmp_path):
    a, b = (written(tmp_path / name, "lfm2", seed, **LFM2) for seed, name in enumerate("ab"))
    assert plan_of(averaged((a, 0, 4), (b, 0, 4))).n_layers == 4
    with pytest.raises(RecipeError, match=r"layer 0 of .*a and layer 1 of .*b are of different kinds \(only one has"):
        plan_of(averaged((a, 0, 2), (b, 1, 3)))
    with pytest.raises(RecipeError, match=r"layer 1 of .*b and layer 0 of .*a are of different kinds"):
        plan_of(Recipe("task_arithmetic", (Slice((Source(b, (1, 2), WEIGHT), Source(a, (0, 1)))),), a))


def test_layers_with_the_same_tensors_but_different_kinds_are_not_merged(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    a, b = (written(tmp_path / name, "gemma3_text", seed, layer_types=kinds) for seed, name in enumerate("ab"))
    with pytest.raises(RecipeError, match="layer_types: 'sliding_attention' and 'full_attention'"):
        plan_of(averaged((a, 0, 2), (b, 1, 3)))
    assert plan_of(averaged((a, 0, 2), (b, 2, 4))).n_layers == 2


def test_layer_types_omitted_by_transformers_4_configs_are_written(tmp_path):
    """In Gemma 2 every other layer uses a sliding window, which older configs do not state."""
    folder = written(tmp_path / "m", "gemma2", layer_types=None)
    expected = AutoConfig.from_pretrained(folder).layer_types
    configure(folder, layer_types=None)
    merge_to_folder(stacked((folder, 0, 2), (folder, 1, 3)), tmp_path / "out")
    merged = AutoConfig.from_pretrained(tmp_path / "out").layer_types
    assert merged == [expected[layer] for layer in (0, 1, 1, 2)]
    assert len(set(merged)) == 2


DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 2,
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "key"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers"),
        ("deepseek_v3", DEEPSEEK, "first_k_dense_replace"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8}, "max_window_layers"),
    ],
)
def test_layers_cannot_move_if_settings_refer_to_positions(tmp_path, kind, settings, key):
    folder = written(tmp_path / "m", kind, **settings)
    configure(folder, layer_types=None)
    assert plan_of(stacked((folder, 0, 2), (folder, 2, 4))).n_layers == 4
    with pytest.raises(RecipeError, match=rf"slices move layer 1 of .*m to layer 2, but its config.json .*\({key}\)"):
        plan_of(stacked((folder, 0, 2), (folder, 1, 4)))


def test_layers_without_rope_keep_that_setting_when_moved(tmp_path):
    folder = written(tmp_path / "m", "smollm3")
    merge_to_folder(stacked((folder, 0, 4), (folder, 3, 4)), tmp_path / "out")
    assert AutoConfig.from_pretrained(folder).no_rope_layers == [1, 1, 1, 0]
    assert AutoConfig.from_pretrained(tmp_path / "out").no_rope_layers == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "llama", "mistral"])
def test_layers_can_move_if_positional_settings_are_not_in_use(tmp_path, kind):
    folder = written(tmp_path / "m", kind)
    assert plan_of(stacked((folder, 0, 3), (folder, 1, 4))).n_layers == 6


def test_lists_unrelated_to_layers_are_left_unchanged(tmp_path):
    folder = str(write_tiny_llama(tmp_path / "m", seed=0, n_layers=2, eos_token_id=[1, 2]))
    merge_to_folder(stacked((folder, 0, 2), (folder, 1, 2)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["num_hidden_layers"]) == ([1, 2], 3)


def test_missing_layer_is_reported(tmp_path):
    folder = str(write_tiny_llama(tmp_path / "m", seed=0, n_layers=3))
    tensors = load_file(Path(folder) / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, Path(folder) / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no tensors of layer 1; is its download complete"):
        plan_of(stacked((folder, 0, 3)))


def test_dtype_is_written_wherever_the_config_has_one(tmp_path):
    """Multimodal models repeat it in the configs of their components."""
    folder = str(write_tiny_llama(tmp_path / "m", seed=0, dtype="float32"))
    configure(folder, torch_dtype="float32", vision_config={"torch_dtype": "float32", "width": 3})
    merge_to_folder(Recipe("linear", (Slice((Source(folder, None, WEIGHT),)),), out_dtype="float16"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"]) == ("float16", "float16")
    assert config["vision_config"] == {"torch_dtype": "float16", "width": 3}
