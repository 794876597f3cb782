"""Names of engine options are checked before an engine is started, where vLLM says which there are."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.build import make_problem, parse_config
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


def test_a_misspelt_option_is_named_with_the_nearest(problem: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        problem({"kind": "vllm", "options": {"max_modle_len": 64, "enforce_eager": True, "magic": 1}})
    assert str(caught.value) == (
        "engine.options: vLLM has no option 'max_modle_len'; did you mean 'max_model_len'? vLLM has no option 'magic'."
    )


def test_what_cannot_be_known_is_not_refused(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"max_modle_len": 64}
    problem({"kind": "transformers", "options": wrong})
    problem({"kind": "vllm", "options": wrong}, begun=True)
    monkeypatch.setattr("evomerge.engine.vllm_option_names", frozenset)
    problem({"kind": "vllm", "options": wrong})


def test_options_with_which_other_weights_would_be_scored_are_refused_before_an_engine_starts(problem: Any) -> None:
    options = {"enforce_eager": True, "pipeline_parallel_size": 2}
    with pytest.raises(
        ConfigError, match=r"pipeline_parallel_size=2 spreads the model .*; use pipeline_parallel_size=1"
    ):
        problem({"kind": "vllm", "options": options})
    problem({"kind": "vllm", "options": options}, begun=True)
