"""Names of engine options are checked before an engine is started, provided vLLM can list its options."""

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.build import evaluate_model, make_problem, parse_config
from evomerge.core import ConfigError
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.fixture
def problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("evomerge.engine.vllm_option_names", lambda: frozenset({"max_model_len", "enforce_eager"}))
    write_tiny_llama(tmp_path / "a", seed=1)
    write_tiny_llama(tmp_path / "b", seed=2)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": ["toy.yaml"],
        "budget": {"evaluations": 9},
    }

    def make(engine: dict[str, Any], **options: bool) -> object:
        return make_problem(parse_config({**settings, "engine": engine}, folder=tmp_path), **options)

    return make


def test_a_misspelt_option_is_reported_with_the_nearest_name(problem: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        problem({"kind": "vllm", "options": {"max_modle_len": 64, "enforce_eager": True, "magic": 1}})
    assert str(caught.value) == (
        "engine.options: vLLM has no option 'max_modle_len'; did you mean 'max_model_len'? vLLM has no option 'magic'."
    )


def test_options_that_cannot_be_checked_are_accepted(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"max_modle_len": 64}
    problem({"kind": "transformers", "options": wrong})
    problem({"kind": "vllm", "options": wrong}, begun=True)
    monkeypatch.setattr("evomerge.engine.vllm_option_names", frozenset)
    problem({"kind": "vllm", "options": wrong})


def test_options_that_would_score_other_weights_are_refused_before_an_engine_starts(problem: Any) -> None:
    options = {"enforce_eager": True, "pipeline_parallel_size": 2}
    with pytest.raises(
        ConfigError, match=r"pipeline_parallel_size=2 distributes the model .*; use pipeline_parallel_size=1"
    ):
        problem({"kind": "vllm", "options": options})
    problem({"kind": "vllm", "options": options}, begun=True)


@pytest.mark.parametrize(
    ("config", "is_refused"),
    [
        ({}, True),
        ({"rope_scaling": None}, True),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, True),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, False),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, False),
        ({"model_max_length": 4096}, False),
        ({"max_position_embeddings": 4096}, False),
    ],
)
def test_more_positions_than_the_model_has_are_refused_before_an_engine_starts(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], is_refused: bool
) -> None:
    monkeypatch.setattr("evomerge.engine.vllm_option_names", frozenset)
    for name in ("a", "b"):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    for kind in ("vllm", "transformers"):
        long = {"kind": kind, "max_model_len": 4096}
        problem({"kind": kind})
        problem(long, begun=True)
        if is_refused or (kind == "transformers" and "max_position_embeddings" not in config):
            with pytest.raises(
                ConfigError, match=r"engine.max_model_len: 4,096 is more than the 512 positions .*; lower it"
            ):
                problem(long)
        else:
            problem(long)


def test_lengths_that_vllm_is_told_to_allow_are_accepted(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"kind": "vllm", "max_model_len": 4096}
    monkeypatch.setattr("evomerge.engine.vllm_option_names", frozenset)
    problem({**long, "options": {"hf_overrides": {"max_position_embeddings": 4096}}})
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0")
    with pytest.raises(ConfigError, match="positions"):
        problem(long)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    problem(long)


def test_evaluating_a_model_beyond_its_positions_is_refused(problem: Any, tmp_path: Path) -> None:
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "tasks": ["toy.yaml"],
        "engine": {"kind": "transformers", "max_model_len": 4096},
        "budget": {"evaluations": 9},
    }
    with pytest.raises(ConfigError, match="more than the 512 positions"):
        evaluate_model(parse_config(settings, folder=tmp_path), tmp_path / "a")
