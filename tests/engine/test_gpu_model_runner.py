"""Requests go through vLLM's GPU code path: model runner V2 with its Triton kernels, and asynchronous scheduling.

On a CPU, vLLM has a different runner and no such scheduling. Here Triton's interpreter runs the kernels in CPU memory: `make triton-test`.
"""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton stays out of this environment; `make triton-test` runs this")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here only under TRITON_INTERPRET=1: `make triton-test`", allow_module_level=True)

import torch
from safetensors.torch import load_file
from triton.backends import backends

from evomerge.core import EngineError
from evomerge.engine import GenerateRequest, LogLikelihoodRequest, make_engine
from evomerge.testing.engine_suite import VOCAB, Answers, random_tokens
from evomerge.testing.engine_writers import write_tensors
from evomerge.testing.engines import cannot_start
from evomerge.testing.tiny_models import write_tiny_llama

pytestmark = pytest.mark.skipif(bool(cannot_start("vllm")), reason=cannot_start("vllm"))

MAX_LENGTH = 192
BLOCK = 32
SHARED = random_tokens("shared", n=3 * BLOCK)

LOG_LIKELIHOODS = [
    *[LogLikelihoodRequest((5, 6, 7), (token,)) for token in (8, 9, 10)],
    *[LogLikelihoodRequest(SHARED, random_tokens("choice", i, n=1 + 2 * i)) for i in range(3)],
    # continuations with a common beginning longer than a block of the prefix cache
    *[LogLikelihoodRequest(SHARED[:7], SHARED[7:] + random_tokens("end", i, n=2)) for i in range(2)],
    LogLikelihoodRequest(random_tokens("long", n=20), random_tokens("longer", n=MAX_LENGTH - 20)),
]
GENERATIONS = [
    *[GenerateRequest(random_tokens("prompt", i, n=1 + 5 * i), max_tokens=3 + 3 * i) for i in range(4)],
    *[GenerateRequest(random_tokens("stop", i, n=7), max_tokens=16, stop=("a", "bc", "7", "{")) for i in range(3)],
    *[GenerateRequest(SHARED + random_tokens("tail", i, n=2), max_tokens=4) for i in range(2)],
]


def answers(engine):
    return Answers(tuple(engine.loglikelihood(LOG_LIKELIHOODS)), tuple(engine.generate(GENERATIONS)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny_llama(folder / f"m{i}", seed=i, hidden=128, vocab=VOCAB, dtype="float32") for i in range(2)]


@pytest.fixture(scope="module")
def engine(models):
    """An engine that splits prompts into chunks and handles several at a time."""
    driver = SimpleNamespace(is_active=lambda: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setitem(backends, "cpu", SimpleNamespace(driver=driver))  # vLLM's CPU build looks this up in triton
        from vllm.platforms.cpu import CpuPlatform

        update = CpuPlatform.check_and_update_config

        def asynchronous(config):
            update(config)
            config.scheduler_config.async_scheduling = True

        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(asynchronous))
        options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "block_size": BLOCK}
        engine = make_engine("vllm", models[0], dtype="float32", max_model_len=MAX_LENGTH, options=options)
    yield engine
    engine.close()


def test_engine_is_configured_as_on_a_gpu(engine):
    config = engine.llm.llm_engine.vllm_config
    assert config.use_v2_model_runner
    assert config.max_concurrent_batches == 2
    assert config.cache_config.enable_prefix_caching


def test_answers_follow_the_weights_that_were_written(engine, models):
    for model in (models[1], models[0], models[1]):
        other = make_engine("transformers", model, dtype="float32", max_model_len=MAX_LENGTH)
        expected = answers(other)
        other.close()
        weights = load_file(model / "model.safetensors")
        engine.update(lambda target, weights=weights: write_tensors(target, weights))
        found = answers(engine)
        assert found.generations == expected.generations
        for ours, theirs in zip(found.log_likelihoods, expected.log_likelihoods, strict=True):
            assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-3)
            assert ours.is_greedy == theirs.is_greedy


def test_nan_raises_an_error_and_leaves_no_trace(engine, models):
    weights = load_file(models[0] / "model.safetensors")
    engine.update(lambda target: write_tensors(target, weights))
    before = answers(engine)
    broken = {name: torch.full_like(value, torch.nan) for name, value in weights.items()}
    engine.update(lambda target: write_tensors(target, broken))
    with pytest.raises(EngineError, match="NaN log-probability"):
        engine.loglikelihood(LOG_LIKELIHOODS)
    with pytest.raises(EngineError, match="NaN log-probability"):
        engine.generate(GENERATIONS)
    engine.update(lambda target: write_tensors(target, weights))
    assert not before.differences(answers(engine))


def test_batch_that_fails_halfway_leaves_no_trace(engine, models, monkeypatch):
    weights = load_file(models[0] / "model.safetensors")
    engine.update(lambda target: write_tensors(target, weights))
    before = answers(engine)
    step, calls = engine.llm.llm_engine.step, []

    def fail_later():
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("the device is gone")
        return step()

    monkeypatch.setattr(engine.llm.llm_engine, "step", fail_later)
    with pytest.raises(EngineError, match="the device is gone"):
        engine.generate(GENERATIONS)
    monkeypatch.undo()
    engine.update(lambda target: write_tensors(target, weights))
    assert not before.differences(answers(engine))
