"""Behaviour specific to the vLLM engine; test_conformance.py has what every engine must do."""

import dataclasses
import inspect

import pytest
import torch

from evomerge.core import EngineError
from evomerge.engine import GenerateRequest, LogLikelihoodRequest, RemoteWrite, make_engine, vllm_option_names
from evomerge.engine.checkpoint import CheckpointFolder
from evomerge.engine.patches import DISTRIBUTED_STATE
from evomerge.testing.engine_suite import random_tokens
from evomerge.testing.engine_writers import write_tensors
from evomerge.testing.engines import cannot_start
from evomerge.testing.tiny_models import write_tiny_llama

pytestmark = pytest.mark.skipif(bool(cannot_start("vllm")), reason=cannot_start("vllm"))


def start(model, **settings):
    return make_engine("vllm", model, **settings)


@pytest.fixture
def suite(suite_of):
    return suite_of("vllm-untied")


def test_without_the_cache_reset_the_suite_detects_stale_tokens(suite, monkeypatch):
    suite.load(0)
    with monkeypatch.context() as without:
        without.setattr(suite.engine.llm, "reset_prefix_cache", lambda: True)
        suite.answers(suite.engine)  # fills the prefix cache with weight set 0
        suite.load(1)
        found = suite.fresh[1].differences(suite.answers(suite.engine))
    assert found, "the prefix cache had no effect; the conformance check could not fail"
    # Only the requests with a long shared prefix are wrong: everything else was recomputed.
    shared = {i for i, request in enumerate(suite.generate_requests) if len(request.prompt) > 300}
    assert {int(text.split()[1].rstrip(":")) for text in found if text.startswith("generation")} <= shared
    suite.load(1)
    suite.check_serves(1)


def test_refused_cache_reset_raises_an_error(suite, monkeypatch):
    monkeypatch.setattr(suite.engine.llm, "reset_prefix_cache", lambda: False)
    suite.load(0)
    with pytest.raises(EngineError, match="prefix cache could not be reset"):
        suite.engine.generate(suite.generate_requests)
    monkeypatch.undo()
    suite.check_serves(0)


def test_requests_of_a_failed_batch_do_not_block_the_next_update(suite, monkeypatch):
    """The NaN values it has computed do not persist either."""
    broken = dict(suite.weights[2])
    broken["model.layers.0.self_attn.v_proj.weight"] = torch.full_like(
        broken["model.layers.0.self_attn.v_proj.weight"], torch.nan
    )
    suite.engine.update(suite.writer(broken))
    step = suite.engine.llm.llm_engine.step
    calls = []

    def fail_later():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the device is gone")
        return step()

    monkeypatch.setattr(suite.engine.llm.llm_engine, "step", fail_later)
    with pytest.raises(EngineError, match="the device is gone"):
        suite.engine.generate(suite.generate_requests)
    monkeypatch.undo()
    with pytest.raises(EngineError, match="last batch of requests failed"):
        suite.engine.generate(suite.generate_requests)
    suite.load(2)
    suite.check_serves(2)


@pytest.mark.parametrize(
    ("function", "broken"), [("evomerge.testing.engine_writers:write_half", False), ("os:no_such_function", True)]
)
def test_process_failures_are_distinguished_from_bad_candidates(suite_of, function, broken):
    """An error with a cause counts as a breakdown; after several of them a worker is replaced."""
    sharded = suite_of("vllm-untied-sharded")
    with pytest.raises(EngineError) as found:
        sharded.engine.update(RemoteWrite(function, {}))
    assert (found.value.__cause__ is not None) == broken
    sharded.load(0)


def test_answers_agree_with_the_transformers_engine(suite):
    for which, folder in enumerate(suite.folders):
        other = make_engine("transformers", folder, dtype="float32", max_model_len=suite.engine.max_length)
        answers = suite.answers(other)
        other.close()
        assert answers.generations == suite.fresh[which].generations
        for ours, theirs in zip(answers.log_likelihoods, suite.fresh[which].log_likelihoods, strict=True):
            assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-3)
            assert ours.is_greedy == theirs.is_greedy


def test_many_single_token_choices_after_one_context(suite):
    """With more last tokens than one vLLM request may ask for."""
    suite.load(0)
    requests = [LogLikelihoodRequest((5, 6, 7), (token,)) for token in range(3, 99)]
    answers = suite.engine.loglikelihood(requests)
    probabilities = torch.tensor([answer.log_probability for answer in answers]).exp()
    assert float(probabilities.sum()) <= 1.0 + 1e-4
    assert sum(answer.is_greedy for answer in answers) <= 1
    singles = [suite.engine.loglikelihood([request])[0].log_probability for request in requests[:40:13]]
    assert singles == pytest.approx([answer.log_probability for answer in answers[:40:13]], abs=1e-5)


def test_log_probabilities_do_not_decode_token_texts(suite, monkeypatch):
    """The texts of answers are still generated; the conformance checks compare them."""
    import vllm.v1.engine.logprobs as upstream

    def fail(tokenizer, tokens):
        raise AssertionError("nobody reads it")

    monkeypatch.setattr(upstream, "convert_ids_list_to_tokens", fail)
    suite.load(0)
    suite.check_serves(0)


@pytest.fixture
def cached_tokens(suite, monkeypatch):
    """For each batch of the engine, how many tokens of each prompt were in the prefix cache."""
    batches = []
    wait = suite.engine.llm.wait_for_completion

    def spied(**settings):
        outputs = wait(**settings)
        batches.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(suite.engine.llm, "wait_for_completion", spied)
    return batches


def test_context_is_computed_once(suite, cached_tokens):
    suite.load(1)
    context = random_tokens("few-shot examples", n=300)
    requests = [LogLikelihoodRequest(context, random_tokens("choice", i, n=3 + i)) for i in range(4)]
    answers = suite.engine.loglikelihood(requests)
    block = suite.engine.llm.llm_engine.vllm_config.cache_config.block_size
    assert cached_tokens == [[0, *[300 // block * block] * 3]]
    for request, answer in zip(requests, answers, strict=True):
        (alone,) = suite.engine.loglikelihood([request])
        assert alone.log_probability == pytest.approx(answer.log_probability, abs=1e-4)
        assert alone.is_greedy == answer.is_greedy
    assert cached_tokens[1:] == [[0]] * 4  # earlier requests have no effect


def test_context_that_ends_at_a_block_boundary(suite, cached_tokens):
    """The cache then holds even the last context token, after which the first token of a continuation is scored."""
    suite.load(1)
    block = suite.engine.llm.llm_engine.vllm_config.cache_config.block_size
    context = random_tokens("few-shot examples", n=300 // block * block)
    requests = [LogLikelihoodRequest(context, random_tokens("choice", i, n=3 + i)) for i in range(3)]
    answers = suite.engine.loglikelihood(requests)
    assert cached_tokens == [[0, len(context), len(context)], [0, 0]]
    for request, answer in zip(requests, answers, strict=True):
        (alone,) = suite.engine.loglikelihood([request])
        assert alone.log_probability == pytest.approx(answer.log_probability, abs=1e-4)


def test_continuations_with_a_common_beginning(suite, cached_tokens):
    """Cached tokens of a continuation have no log-probabilities, so those sequences are run again without the cache."""
    suite.load(1)
    beginning = random_tokens("beginning", n=290)
    continuations = [beginning + random_tokens("end", i, n=2) for i in range(3)]
    requests = [LogLikelihoodRequest((5, 6), continuation) for continuation in continuations]
    answers = suite.engine.loglikelihood(requests)
    assert [len(batch) for batch in cached_tokens] == [3, 2]
    assert cached_tokens[1] == [0, 0]
    for request, answer in zip(requests, answers, strict=True):
        (alone,) = suite.engine.loglikelihood([request])
        assert alone.log_probability == pytest.approx(answer.log_probability, abs=1e-4)


def test_bfloat16_layout_is_found_and_options_are_applied(tmp_path):
    """In bfloat16, numbers above 256 need several digits; options reach vLLM and override evomerge's choices."""
    model = write_tiny_llama(tmp_path / "m", seed=3, tied=True, hidden=128, vocab=700, intermediate_size=300)
    engine = start(
        model, dtype="bfloat16", max_model_len=128, options={"max_model_len": 96, "kv_cache_memory_bytes": 32 << 20}
    )
    try:
        assert engine.max_length == 96
        targets = []
        with CheckpointFolder(model) as checkpoint:
            tensors = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
        engine.update(lambda target: (targets.append(target), write_tensors(target, tensors)))
        for name in targets[0].names():
            for region in targets[0].regions(name):
                assert region.view.dtype == torch.bfloat16
                assert torch.equal(region.view, tensors[name][region.index])
        assert engine.generate([GenerateRequest((5, 6), 3)])[0].n_tokens <= 3
    finally:
        engine.close()


def test_log_likelihoods_need_no_tokenizer(tmp_path):
    model = write_tiny_llama(tmp_path / "m", seed=3, hidden=128)
    engine = start(model, max_model_len=64, options={"skip_tokenizer_init": True})
    try:
        assert engine.loglikelihood([LogLikelihoodRequest((5, 6), (7,))])[0].log_probability < 0.0
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 distributes the model"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2 distributes the model"),
        ({"enable_eplb": True}, "enable_eplb=True moves experts"),
        ({"offload_group_size": 8}, "offload_group_size=8 lets layers share memory"),
        ({"kv_offloading_size": 4.0}, "kv_offloading_size=4.0 keeps cached prefixes"),
        (
            {"kv_transfer_config": {"kv_connector": "c", "kv_role": "kv_both"}},
            "kv_transfer_config=.* keeps cached prefixes",
        ),
        ({"no_such_option": 1}, "cannot serve"),
        ({"max_model_len": 100_000}, "cannot serve"),
    ],
)
def test_wrong_options_are_named(suite, options, what):
    with pytest.raises(EngineError, match=what):
        start(suite.folders[0], options=options)


def test_option_names_read_from_the_source_match_vllm():
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    arguments = {
        name for name, one in inspect.signature(vllm.LLM.__init__).parameters.items() if one.kind is one.KEYWORD_ONLY
    }
    assert vllm_option_names() == (fields | arguments) - {"model"}


def test_unsupported_vllm_version_is_refused(suite, monkeypatch):
    """If it stores weights differently, the first candidate's weights might remain in use."""
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    with pytest.raises(
        EngineError, match=r"^vLLM 0\.34\.0: replacing weights in place is supported in vLLM 0\.32 and 0\.33 only"
    ):
        start(suite.folders[0])


def test_engine_that_fails_to_start_is_shut_down(tmp_path, monkeypatch):
    """Whatever went wrong, its memory and its share of vLLM's process-wide state are released."""
    model = write_tiny_llama(tmp_path / "model", seed=0)
    shut_down = []

    def fail(*arguments):
        raise torch.OutOfMemoryError("no room for the layout")

    monkeypatch.setattr("evomerge.engine.vllm_engine._weights", fail)
    monkeypatch.setattr(DISTRIBUTED_STATE, "release", shut_down.append)
    with pytest.raises(torch.OutOfMemoryError):
        start(model, max_model_len=64)
    assert len(shut_down) == 1
    monkeypatch.undo()
    DISTRIBUTED_STATE.release(shut_down[0])
