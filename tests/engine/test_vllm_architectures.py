"""Models that vLLM runs with transformers' code are scored as transformers scores them, or refused.

vLLM decorates a model class permanently, so in the same process transformers cannot create a model of a kind that vLLM has served; each
test here uses a different kind of model.
"""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_transformers_architectures import written
from transformers import AutoModelForCausalLM

from evomerge.core import EngineError
from evomerge.engine import LogLikelihoodRequest, engine_environment, make_engine
from evomerge.engine.environment import vllm_targets_cpu
from evomerge.plan import read_model_header
from evomerge.testing.engine_writers import write_tensors
from evomerge.testing.engines import cannot_start
from evomerge.weights import write_slots_folder

pytestmark = pytest.mark.skipif(bool(cannot_start("vllm")), reason=cannot_start("vllm"))
WIDE = {"hidden_size": 128, "intermediate_size": 96, "num_key_value_heads": 4}
"""heads of 32, the narrowest that vLLM serves on a CPU"""
PROMPT, CONTINUATION = (5, 6, 7), (8, 9)


def log_probability(folder: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + CONTINUATION])).logits[0].log_softmax(-1)
    return sum(float(logits[len(PROMPT) - 1 + i, token]) for i, token in enumerate(CONTINUATION))


def test_output_layer_with_a_bias_is_replaced(tmp_path):
    """vLLM recreates that bias at every load, even during layout discovery."""
    folders = [written(tmp_path / str(seed), "phi", seed, torch.float32, **WIDE) for seed in range(2)]
    expected = [log_probability(folder) for folder in folders]
    tensors = [load_file(f"{folder}/model.safetensors") for folder in folders]
    assert tensors[1]["lm_head.bias"].std() > 0.1
    engine = make_engine("vllm", folders[0], dtype="float32")
    try:
        request = LogLikelihoodRequest(PROMPT, CONTINUATION)
        for which in (0, 1):
            if which:
                engine.update(lambda target: write_tensors(target, tensors[1]))
            assert engine.loglikelihood([request])[0].log_probability == pytest.approx(expected[which], abs=1e-3)
    finally:
        engine.close()


def test_matrices_that_vllm_stores_transposed_are_replaced(tmp_path):
    """They go through vLLM's own loader at every update."""
    sizes = {"hidden_size": 128, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
    folders = [written(tmp_path / str(seed), "gpt2", seed, torch.float32, **sizes) for seed in range(2)]
    expected = [log_probability(folder) for folder in folders]
    tensors = load_file(f"{folders[1]}/model.safetensors")
    engine = make_engine("vllm", folders[0], dtype="float32")
    try:
        request = LogLikelihoodRequest(PROMPT, CONTINUATION)
        assert engine.loglikelihood([request])[0].log_probability == pytest.approx(expected[0], abs=1e-3)
        engine.update(lambda target: write_tensors(target, tensors))
        assert engine.loglikelihood([request])[0].log_probability == pytest.approx(expected[1], abs=1e-3)
        assert abs(expected[0] - expected[1]) > 0.1
    finally:
        engine.close()


def test_configured_key_value_heads_that_the_model_ignores_are_refused(tmp_path):
    """GPTBigCode has one, or as many as attention heads (`multi_query`); vLLM would use the two that config.json states."""
    sizes = WIDE | {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
    folder = written(tmp_path / "a", "gpt_bigcode", 0, torch.float32, **sizes | {"num_key_value_heads": 2})
    with pytest.raises(
        EngineError, match=r"config\.json has num_key_value_heads = 2, which a gpt_bigcode model ignores"
    ):
        make_engine("vllm", folder, dtype="float32")


HEADS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 64}
LATENT = HEADS | {"first_k_dense_replace": 2, "num_hidden_layers": 2}


def test_replacing_latent_attention_updates_the_derived_matrices(tmp_path, monkeypatch):
    """vLLM multiplies by transposed halves of `kv_b_proj`, which are views of the same memory."""
    monkeypatch.setattr("evomerge.engine.vllm_start._check_latent_attention", lambda llm: None)
    folders = [written(tmp_path / str(seed), "deepseek_v3", seed, torch.float32, **LATENT) for seed in range(2)]
    request = LogLikelihoodRequest(PROMPT, CONTINUATION)
    engine, fresh = (make_engine("vllm", folder, dtype="float32") for folder in folders)
    try:
        first = engine.loglikelihood([request])
        tensors = load_file(f"{folders[1]}/model.safetensors")
        engine.update(lambda target: write_tensors(target, tensors))
        assert engine.loglikelihood([request]) == fresh.loglikelihood([request]) != first
    finally:
        engine.close()
        fresh.close()


@pytest.mark.skipif(not vllm_targets_cpu(), reason="the installed vLLM is not a CPU build")
def test_latent_attention_is_refused_on_a_cpu_if_vllm_rotates_it_wrongly(tmp_path):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = {"rope_theta": 1e4, "rope_type": "default"}
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(64, max_position=64, is_neox_style=False, rope_parameters=parameters, dtype=torch.float32)
    positions, queries, keys = torch.arange(5), torch.randn(5, 4, 64), torch.randn(5, 1, 64)
    expected, _ = rope.forward_native(positions, queries.clone(), keys.clone())
    rotated, _ = rope.forward_cpu(positions, queries.clone(), keys.clone())
    assert not torch.allclose(rotated, expected, atol=1e-2), "fixed upstream: `_check_latent_attention` can be removed"

    folder = written(tmp_path / "a", "deepseek_v3", 0, torch.float32, **LATENT)
    with pytest.raises(EngineError, match="wrong positions"):
        make_engine("vllm", folder, dtype="float32")


def test_packed_experts_are_refused_even_if_all_weights_are_zero(tmp_path):
    """As in the checkpoint from which an engine for layer stacks starts: its values do not reveal the layout."""
    folder = written(tmp_path / "a", "mixtral", 0, torch.float32, **WIDE)
    (tmp_path / "slots").mkdir()
    write_slots_folder(tmp_path / "slots", read_model_header(folder), 4)
    # in a separate process: vLLM creates no process group for experts if an engine without experts was started before
    script = (
        f"from evomerge.engine import make_engine\nmake_engine('vllm', {str(tmp_path / 'slots')!r}, dtype='float32')"
    )
    environment = os.environ | engine_environment()
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert ended.returncode == 1
    assert "EngineError: vLLM layer" in ended.stderr
    assert "stores its experts in the layout of" in ended.stderr
