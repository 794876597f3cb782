"""Each patch of vLLM is needed (shown on unpatched vLLM in a separate process) and in effect."""

import json
import os
import subprocess
import sys

import pytest
import torch

from evomerge.core import EngineError
from evomerge.engine import available_engines, engine_environment, make_engine
from evomerge.engine.environment import vllm_targets_cpu
from evomerge.engine.patches import DISTRIBUTED_STATE, check_writable_cpu_linears, writable_cpu_linears
from evomerge.testing.tiny_models import write_tiny_llama

pytestmark = [
    pytest.mark.skipif("vllm" not in available_engines(), reason="vLLM is not installed"),
    pytest.mark.skipif(not vllm_targets_cpu(), reason="the patches concern vLLM's CPU build"),
]

UNPATCHED = """
import json, sys
import torch
from vllm import LLM, SamplingParams

found = {}
setter = torch.set_num_threads
settings = dict(
    dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=16 << 20, use_tqdm_on_load=False
)
prompts, parameters = [{"prompt_token_ids": [5, 6, 7]}], SamplingParams(temperature=0, max_tokens=4)
first, second = (LLM(model=sys.argv[1], **settings) for _ in range(2))
found["thread setter replaced"] = torch.set_num_threads is not setter
model = second.apply_model(lambda module: module)[0]
found["parameter emptied"] = model.model.layers[0].self_attn.qkv_proj.weight.numel() == 0
before = second.generate(prompts, parameters, use_tqdm=False)[0].outputs[0].token_ids
model.lm_head.weight.data.zero_()
second.reset_prefix_cache()
found["write ignored"] = second.generate(prompts, parameters, use_tqdm=False)[0].outputs[0].token_ids == before
first.llm_engine.engine_core.shutdown()
try:
    second.generate(prompts, parameters, use_tqdm=False)
    found["other engine dead"] = False
except (AssertionError, RuntimeError, ValueError, AttributeError):
    found["other engine dead"] = True
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(
        tmp_path_factory.mktemp("models") / "m", seed=0, tied=False, hidden=128, vocab=99, dtype="float32"
    )


def test_unpatched_vllm_needs_the_patches(model):
    done = subprocess.run(
        [sys.executable, "-c", UNPATCHED, str(model)],
        env=os.environ | engine_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("FOUND ")) == {
        "thread setter replaced": True,
        "parameter emptied": True,
        "write ignored": True,
        "other engine dead": True,
    }


def test_upstream_is_patched_only_while_an_engine_starts(model):
    import vllm.model_executor.layers.utils as layers
    import vllm.v1.engine.core as core

    before = layers.dispatch_cpu_unquantized_gemm, core.cleanup_dist_env_and_memory, torch.set_num_threads
    engine = make_engine("vllm", model, max_model_len=64, options={"kv_cache_memory_bytes": 16 << 20})
    packed = torch.nn.Linear(2, 2)
    packed.cpu_linear = lambda x, weight, bias: x
    check_writable_cpu_linears(engine.llm.apply_model(lambda module: module)[0])
    engine.close()
    assert before == (layers.dispatch_cpu_unquantized_gemm, core.cleanup_dist_env_and_memory, torch.set_num_threads)
    with pytest.raises(EngineError, match="layer '0' has packed its weight"):
        check_writable_cpu_linears(torch.nn.Sequential(packed))


def test_changed_upstream_is_refused(monkeypatch):
    import vllm.model_executor.layers.utils as layers
    import vllm.v1.engine.core as core

    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", lambda layer: None)
    with pytest.raises(EngineError, match="dispatch_cpu_unquantized_gemm"), writable_cpu_linears():
        pass
    monkeypatch.setattr(core, "cleanup_dist_env_and_memory", lambda: None)
    with pytest.raises(EngineError, match="cleanup_dist_env_and_memory"):
        DISTRIBUTED_STATE.release(lambda: None)
