"""What a worker starts is ended again where its evaluator cannot be made."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from evomerge.build import parse_config
from evomerge.build.evaluators import evaluator_settings, make_evaluator
from evomerge.core import EvaluationError, Split
from evomerge.evaluation.sandbox import check_sandbox
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


class Closed(list[str]):
    """An engine that notes when it is closed; scores nothing."""

    def engine(self, max_length: int) -> SimpleNamespace:
        return SimpleNamespace(max_length=max_length, close=lambda: self.append("closed"))


@pytest.mark.parametrize(("max_length", "message"), [(3, "are too long"), (64, "has no report items")])
def test_the_engine_is_closed(folder: Path, monkeypatch: pytest.MonkeyPatch, max_length: int, message: str) -> None:
    closed = Closed()
    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: closed.engine(max_length))
    make_evaluator(settings(folder) | {"splits": [Split.SEARCH.value]}) if max_length > 3 else None
    assert not closed
    task = (folder / "toy.yaml").read_text().replace("report: toy.report.jsonl", "other: toy.report.jsonl")
    (folder / "toy.yaml").write_text(task)
    with pytest.raises(EvaluationError, match=message):
        make_evaluator(settings(folder))
    assert closed


def test_sandboxes_are_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check_sandbox()
    except EvaluationError as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr("evomerge.engine.make_engine", lambda *args, **options: Closed().engine(64))
    write_toy_task(folder / "broken.yaml", n_items=4)
    wanted = settings(folder, tasks=["toy.yaml", "broken.yaml"], evaluation={"trust_task_code": True})
    (folder / "broken.search.jsonl").write_text("no JSON")
    before = set(psutil.Process().children())
    with pytest.raises(EvaluationError, match="its data cannot be loaded"):
        make_evaluator(wanted)
    assert set(psutil.Process().children()) <= before
