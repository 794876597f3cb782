"""Answers of a sandbox are checked, and waited for however long they take and whatever other files are open."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.core import EvaluationError, Split
from evomerge.engine import Generation
from evomerge.evaluation import TaskSpec
from evomerge.evaluation.sandbox import SandboxedTask


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"counts": None},
        {"counts": [1]},
        {"counts": [-1, 3]},
        {"counts": [], "generations": []},
        {"generations": [[["x"], 4, []]] * 2},
        {"generations": [[[float("inf")], 4, []]] * 2},
        {"likelihoods": 5},
        {"represents": float("nan")},
        {"represents": 0.5},
        {"represents": float("inf")},
    ],
)
def test_what_a_sandbox_reports_about_its_items_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    items = {
        "counts": [1, 1], "n_dropped": 0, "represents": 1.0, "targets": [], "likelihoods": [], "generations": [[[1, 2], 4, ["."]], [[1], 4, []]],
    }  # fmt: skip
    answer = {"name": "t", "metric": "m", "filter": "none", "splits": {"search": items | changes}}
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(task: SandboxedTask) -> dict[str, object]:
        task._process = process
        return answer

    monkeypatch.setattr(SandboxedTask, "_start", start)
    if changes:
        with pytest.raises(EvaluationError, match="its sandbox returned an invalid answer"):
            SandboxedTask(TaskSpec("t.yaml"), tmp_path, timeout_s=1)
        assert process.returncode == -signal.SIGKILL
        return
    task = SandboxedTask(TaskSpec("t.yaml"), tmp_path, timeout_s=1)
    for scores in (None, [1.0], [1.0, "x"], [1.0, float("nan")], [1.0, 10**400]):
        monkeypatch.setattr(task, "score", lambda order, scores=scores: scores)
        with pytest.raises(EvaluationError, match="the sandbox did not return one score per item"):
            task.items(Split.SEARCH).score([], [Generation("a", 1)] * 2)


def answering(code: str, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 30) -> SandboxedTask:
    """A task whose sandbox is a process that runs `code`."""
    answer = {"name": "t", "metric": "m", "filter": "none", "splits": {}}
    monkeypatch.setattr(SandboxedTask, "_start", lambda self: answer)
    task = SandboxedTask(TaskSpec("t.yaml"), Path(), timeout_s=timeout_s)
    task._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return task


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("input(); print('[' * 1_000_000)", "its sandbox died .*recursion"),
        ("input(); print([])", r"its sandbox returned an invalid answer: \[\]"),
        ("input(); print('x' * 3000, end='', flush=True); input()", "its sandbox died .*incomplete answer"),
    ],
    ids=["nested", "list", "endless"],
)
def test_an_unreadable_answer_is_the_sandboxs_fault(monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    if code.endswith("input()"):
        monkeypatch.setattr("evomerge.evaluation.sandbox._MAX_ANSWER_BYTES", 2000)
    task = answering(code, monkeypatch)
    with pytest.raises(EvaluationError, match=message):
        task.score({})
    assert task._process is None


def test_a_worker_with_many_open_files_can_use_its_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    task = answering("""input(); print('{"scores": [1.0]}')""", monkeypatch)
    try:
        assert task.score({}) == [1.0]
    finally:
        task.close()
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_sandbox_may_have_a_timeout_of_years(monkeypatch: pytest.MonkeyPatch) -> None:
    task = answering("""input(); print('{"scores": [1.0]}')""", monkeypatch, timeout_s=1e9)
    assert task.score({}) == [1.0]
    task.close()
