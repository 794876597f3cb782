"""Models whose weights transformers renames or fuses while loading: they are replaced in place like those of any other model."""

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_live_equals_export import RECIPES, assert_holds, exported
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from evomerge.core import EngineError
from evomerge.engine import GenerateRequest, LogLikelihoodRequest
from evomerge.engine.answers import AnswerDecoder
from evomerge.engine.greedy import STATEFUL
from evomerge.engine.transformers_engine import TransformersEngine
from evomerge.plan import folding_of, make_plan, padded, read_model_header
from evomerge.recipe import StackLayer, stack_recipe
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool, write_slots_folder

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": MOE | {"head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4,
    },
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 0.5},
    "mistral3": {
        "text_config": SMALL | {"model_type": "mistral", "head_dim": 8},
        "vision_config": {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14},
    },
    "gemma3": {
        "text_config": SMALL | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 1,
    },
}  # fmt: skip
"""model type -> settings beside `SMALL`"""


def written(folder: Path, kind: str, seed: int, dtype: torch.dtype, **settings: object) -> str:
    """A checkpoint as written by transformers, with random weights that all have an effect."""
    own = KINDS.get(kind, {}) | settings
    config = AutoConfig.for_model(kind, **(own if "text_config" in own else SMALL | own))
    torch.manual_seed(seed)
    with_images = kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model = (AutoModelForImageTextToText if with_images else AutoModelForCausalLM).from_config(config).to(dtype)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    write_tiny_llama(folder, seed=0)  # only for its tokenizer
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return str(folder)


def log_likelihoods(engine):
    requests = [LogLikelihoodRequest((5, 6, 7), (8, 9)), LogLikelihoodRequest((20,), (21,))]
    return [answer.log_probability for answer in engine.loglikelihood(requests)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_replaced_in_place_equal_the_export(kind, dtype, tmp_path):
    folders = [written(tmp_path / name, kind, seed, dtype) for seed, name in enumerate("abc")]
    headers = {folder: read_model_header(folder) for folder in folders}
    name = str(dtype).removeprefix("torch.")
    engine = TransformersEngine(folders[0], dtype=name)
    auto = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    plain = auto.from_pretrained(folders[0], dtype=dtype, attn_implementation="eager").eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logits = plain(tokens).logits[0].float().log_softmax(-1)
    assert log_likelihoods(engine)[0] == pytest.approx(
        float(logits[2, 8] + logits[3, 9]), abs=1e-4 if name == "float32" else 0.2
    )
    assert_holds(engine, load_file(Path(folders[0]) / "model.safetensors"))
    recipe = RECIPES["ties"](*folders)
    plan = make_plan(recipe, headers)
    engine.update(lambda target: Merger(WeightPool(headers)).write(plan, target))
    assert_holds(engine, exported(recipe, tmp_path / "merged"))
    fresh = TransformersEngine(tmp_path / "merged", dtype=name)
    assert log_likelihoods(engine) == log_likelihoods(fresh)
    requests = [GenerateRequest((5, 6, 7), 6), GenerateRequest((9, 10), 6)]
    assert engine.generate(requests) == fresh.generate(requests)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stack_of_mixture_of_experts_layers_equals_the_export(kind, tmp_path):
    """In an engine with more layers than the stack, started from an all-zero checkpoint."""
    folder = written(tmp_path / "a", kind, 0, torch.float32)
    headers = {folder: read_model_header(folder)}
    (tmp_path / "slots").mkdir()
    write_slots_folder(tmp_path / "slots", headers[folder], 4)
    engine = TransformersEngine(tmp_path / "slots")
    folding = folding_of(headers[folder])
    layers = [StackLayer(layer, ((folder, 1.0),), scale) for layer, scale in ((1, 0.5), (0, 1.0), (1, 1.5))]
    recipe = stack_recipe(layers, ends=[(folder, 1.0)], folding=folding, out_dtype="float32")
    plan = padded(make_plan(recipe, headers), 4, folding.silenced)
    engine.update(lambda target: Merger(WeightPool(headers)).write(plan, target))
    exported(recipe, tmp_path / "merged")
    assert log_likelihoods(engine) == pytest.approx(log_likelihoods(TransformersEngine(tmp_path / "merged")), abs=1e-4)


def test_loader_that_permutes_weights_is_refused_at_start(tmp_path, monkeypatch):
    """transformers does this for some models: it permutes the rows of the query matrix for its rotary embedding."""
    folder = written(tmp_path / "a", "mixtral", 0, torch.float32)
    load = TransformersEngine._load_another

    def permuting(self, tensors):
        return load(self, {name: tensor.flip(0) if "q_proj" in name else tensor for name, tensor in tensors.items()})

    monkeypatch.setattr(TransformersEngine, "_load_another", permuting)
    with pytest.raises(EngineError, match=r"q_proj\.weight' as plain blocks.*engine\.kind"):
        TransformersEngine(folder)


STATES = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
STATEFUL_KINDS = {
    "bamba": STATES | {"attn_layer_indices": [1]},
    "falcon_h1": STATES | {"mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": STATES | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {
        "hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8,
        "head_dim": 8,
    },
    "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": LINEAR | MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | MOE | {"shared_expert_intermediate_size": 16},
    "zamba2": {
        "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8,
        "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [*STATEFUL, "lfm2"])
def test_recurrent_state_is_continued_in_batches_with_other_prompts(kind, tmp_path):
    """Prompts of different lengths, some of which end early, compared with recomputing each prompt on its own at every step."""
    if kind == "mamba2" and "cache" not in inspect.signature(transformers.Mamba2ForCausalLM.forward).parameters:
        pytest.skip("takes no cache of transformers before 5.24, and is refused")
    folder = written(tmp_path / "a", kind, 0, torch.float32, **STATEFUL_KINDS.get(kind, {}))
    engine = TransformersEngine(folder, max_model_len=64)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    decoder = AnswerDecoder(tokenizer, 99)
    requests = [
        GenerateRequest((5, 6, 7), 8), GenerateRequest((9, 10, 11, 12, 13, 14), 3), GenerateRequest((20,), 5), GenerateRequest((33, 34), 8),
    ]  # fmt: skip
    for request, answer in zip(requests, engine.generate(requests), strict=True):
        prompt, tokens = request.prompt, list(request.prompt)
        while len(tokens) < len(prompt) + request.max_tokens and tokens[-1] != 1:
            with torch.no_grad():
                tokens.append(int(plain(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert answer.text == decoder.after(prompt)(tokens[len(prompt) :])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", {"state_size": 4}),
        ("recurrent_gemma", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"], "block_size": 8, "num_local_experts": 2}),
    ],
    ids=["mamba", "recurrent_gemma", "minimax"],
)
def test_model_with_its_own_kind_of_cache_is_refused(kind, settings, tmp_path):
    folder = written(tmp_path / "a", kind, 0, torch.float32, **settings)
    with pytest.raises(EngineError, match=r"ForCausalLM.*its own kind of cache.*vllm"):
        TransformersEngine(folder, max_model_len=64)


def test_model_whose_tokens_attend_to_later_tokens_is_refused(tmp_path):
    text = SMALL | {"model_type": "gemma", "head_dim": 8}
    vision = KINDS["gemma3"]["vision_config"] | {"model_type": "siglip_vision_model", "projection_dim": 32}
    folder = written(tmp_path / "a", "paligemma", 0, torch.float32, text_config=text, vision_config=vision)
    with pytest.raises(EngineError, match="PaliGemmaForConditionalGeneration is not causal"):
        TransformersEngine(folder)


def test_model_with_another_cache_is_refused_at_the_start(tmp_path):
    folder = written(tmp_path / "minimax", "minimax", 0, torch.float32, num_local_experts=2, head_dim=8)
    with pytest.raises(EngineError, match=r"MiniMaxForCausalLM.*its own kind of cache"):
        TransformersEngine(folder)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.masked_bias"])
def test_obsolete_buffers_of_old_checkpoints_are_ignored(tmp_path, name):
    from safetensors.torch import save_file

    folder = write_tiny_llama(tmp_path / "a", seed=0)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    assert_holds(TransformersEngine(folder), tensors)
