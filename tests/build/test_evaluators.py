"""Whatever a worker starts is shut down again if its evaluator cannot be made."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from evomerge.build import parse_config
from evomerge.build.evaluators import evaluator_settings, make_evaluator
from evomerge.build.fingerprints import source_marks
from evomerge.build.problem import make_problem
from evomerge.config import SearchConfig
from evomerge.core import (
    ConfigError,
    EngineError,
    Evaluation,
    EvaluationError,
    EvaluationRequest,
    RecipeError,
    Split,
    Status,
)
from evomerge.engine import LogLikelihood
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write_tiny_llama(tmp_path / name, seed=seed)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    return tmp_path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    config = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": ["toy.yaml"],
        "engine": {"kind": "transformers"},
        "budget": {"evaluations": 4},
        **changes,
    }
    return dict(evaluator_settings(parse_config(config, folder=folder)))


def test_a_worker_refuses_models_and_tasks_other_than_the_searchs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster each machine reads its own files."""
    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: Closed().engine(64))
    config = SearchConfig.model_validate(settings(folder)["config"])
    marks = source_marks(config, make_problem(config).headers)
    given = dict(evaluator_settings(config, marks=marks))
    make_evaluator(given).close()
    items = folder / "toy.search.jsonl"
    items.write_text(items.read_text().replace("search 1 is", "search one is"))
    write_tiny_llama(folder / "b", seed=7)
    with pytest.raises(
        ConfigError, match=f"started the search: models {folder / 'b'}, tasks {folder / 'toy.yaml'}; copy"
    ):
        make_evaluator(given)
    make_evaluator(given | {"marks": None}).close()


def test_the_merger_keeps_its_threads_when_the_engine_leaves_torch_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does so on a GPU once its model is loaded, unless environment variables set the threads."""

    def start(*args: object, **options: object) -> object:
        torch.set_num_threads(1)
        return Closed().engine(64)

    monkeypatch.setattr("evomerge.engine.make_engine", start)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        evaluator: Any = make_evaluator(settings(folder))
        assert evaluator._merger._batch._threads.count == 2
    finally:
        torch.set_num_threads(n_threads)
    evaluator.close()


class Closed(list[str]):
    """Records when its engine is closed; the engine scores nothing."""

    def engine(self, max_length: int) -> SimpleNamespace:
        return SimpleNamespace(max_length=max_length, close=lambda: self.append("closed"))


def test_the_engine_is_closed_when_an_evaluator_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Closed()
    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: closed.engine(3))
    with pytest.raises(EvaluationError, match="the engine has room for 3"):
        make_evaluator(settings(folder))
    assert closed


def test_tasks_are_refused_before_an_engine_is_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_engine(*args: Any, **options: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("evomerge.engine.make_engine", make_engine)
    with pytest.raises(EvaluationError, match="the engine has room for 8"):
        make_evaluator(settings(folder, engine={"kind": "transformers", "max_model_len": 8}))
    task = (folder / "toy.yaml").read_text().replace("report: toy.report.jsonl", "other: toy.report.jsonl")
    (folder / "toy.yaml").write_text(task)
    with pytest.raises(EvaluationError, match="has no report items"):
        make_evaluator(settings(folder))
    with pytest.raises(AssertionError, match="an engine was started"):
        make_evaluator(settings(folder) | {"splits": [Split.SEARCH.value]})


@pytest.mark.usefixtures("sandbox")
def test_sandboxes_are_closed_when_an_evaluator_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: Closed().engine(64))
    write_toy_task(folder / "broken.yaml", n_items=4)
    wanted = settings(folder, tasks=["toy.yaml", "broken.yaml"], evaluation={"trust_task_code": True})
    (folder / "broken.search.jsonl").write_text("no JSON")
    before = set(psutil.Process().children())
    with pytest.raises(EvaluationError, match="its data cannot be loaded"):
        make_evaluator(wanted)
    assert set(psutil.Process().children()) <= before


def test_merges_take_only_the_gpu_memory_that_vllm_leaves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This also holds in the processes of a tensor-parallel engine, which are told the amount."""
    written: list[Any] = []
    engine = SimpleNamespace(max_length=64, close=lambda: None, is_sharded=True, update=written.append)
    asked: list[Any] = []

    def source_room(options: dict[str, Any], *, gpus: float) -> float:
        asked.append((options, gpus))
        return 5e9

    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: engine)
    monkeypatch.setattr("evomerge.engine.vllm_memory_options", lambda needs: {"gpu_memory_utilization": 0.3})
    monkeypatch.setattr("evomerge.engine.source_room", source_room)
    wanted = settings(folder, engine={"kind": "vllm"}, cluster={"gpus_per_worker": 0.5})
    evaluator = make_evaluator(wanted)
    assert asked == [({"gpu_memory_utilization": 0.3}, 0.5)]
    weight = {"weight": (Setting(0.5),)}
    recipe = Recipe("linear", (Slice(tuple(Source(key, parameters=weight) for key in wanted["models"])),))
    evaluator.evaluate(EvaluationRequest("c000000", Split.SEARCH, recipe.to_json()))
    assert written[0].settings["gpu_bytes"] == 5e9


def test_a_worker_whose_libraries_fail_repeatedly_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may be gone for good. Errors that evomerge itself reports about a candidate do not count, nor do single failures."""
    failing: list[Exception | None] = []

    def update(write: object) -> None:
        if (problem := failing.pop(0)) is not None:
            raise problem

    def loglikelihood(requests: list[Any]) -> list[LogLikelihood]:
        return [LogLikelihood(-1.0, False) for _ in requests]

    closed = Closed()
    engine = closed.engine(64)
    engine.update, engine.loglikelihood, engine.is_sharded = update, loglikelihood, False
    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: engine)
    monkeypatch.setattr("evomerge.evaluation.TaskSet.close", lambda _: closed.append("tasks"))
    wanted = settings(folder)
    evaluator = make_evaluator(wanted)

    def evaluate(weight: float) -> Evaluation:
        setting = {"weight": (Setting(weight),)}
        recipe = Recipe("linear", (Slice(tuple(Source(key, parameters=setting) for key in wanted["models"])),))
        return evaluator.evaluate(EvaluationRequest("c000000", Split.SEARCH, recipe.to_json()))

    ours, lost = EngineError("NaN"), EngineError("a batch failed")
    lost.__cause__ = RuntimeError("the device is gone")
    failing[:] = [
        ours,
        ours,
        RecipeError("no"),
        RecipeError("no"),
        lost,
        RuntimeError("no memory"),
        None,
        lost,
        ours,
        lost,
    ]
    assert [evaluate(number).status for number in range(1, 11)] == [Status.FAILED] * 6 + [Status.OK] + [
        Status.FAILED
    ] * 3
    failing[:] = [RuntimeError("no memory")]
    with pytest.raises(RuntimeError, match="no memory"):
        evaluate(11)
    evaluator.close()
    assert closed == ["tasks", "closed"]


def test_weights_are_kept_only_for_the_same_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are reused on another split, but not after a failure, nor if another recipe came in between."""
    updates: list[str] = []
    fails: list[Exception] = []

    def loglikelihood(requests: list[Any]) -> list[LogLikelihood]:
        if fails:
            raise fails.pop()
        return [LogLikelihood(-1.0, False) for _ in requests]

    engine = Closed().engine(64)
    engine.update = lambda write: updates.append("update")
    engine.loglikelihood, engine.is_sharded = loglikelihood, False
    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: engine)
    wanted = settings(folder)
    evaluator = make_evaluator(wanted)

    def n_updates(weight: float, split: Split = Split.SEARCH) -> int:
        updates.clear()
        setting = {"weight": (Setting(weight),)}
        recipe = Recipe("linear", (Slice(tuple(Source(key, parameters=setting) for key in wanted["models"])),))
        evaluator.evaluate(EvaluationRequest("c000000", split, recipe.to_json()))
        return len(updates)

    assert [n_updates(0.25), n_updates(0.25, Split.SELECT), n_updates(0.5), n_updates(0.25)] == [1, 0, 1, 1]
    fails.append(EngineError("NaN"))
    assert [n_updates(0.25), n_updates(0.25), n_updates(0.25)] == [0, 1, 0]
    evaluator.close()
