"""The pool inside one process."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.cluster import LocalPool
from evomerge.cluster.local_pool import THREAD_NAME
from evomerge.core import (
    CheckpointError,
    EngineError,
    Status,
)
from tests.cluster.driving import ALONE, EXITING, SCRIPTED, SLOW, UNLOADABLE, drain, submit


@pytest.fixture(autouse=True)
def no_thread_is_left(tmp_path: Path) -> Iterator[None]:
    """A command that a later test runs in this process would wait for a thread left over from an abandoned evaluation, and end the process."""
    yield
    for name in ("wait-1", "starting"):
        (tmp_path / f"{name}-no-more").touch()
    deadline = time.monotonic() + 30
    while any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_local_pool_evaluates_everything_once(tmp_path: Path) -> None:
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 3)
    submit(pool, *(f"ok-{index}" for index in range(20)), "raise-1")
    results = drain(pool, 21)
    assert results.pop("raise-1").error == "RuntimeError: scripted\n  in two lines"
    assert {result.status for result in results.values()} == {Status.OK}
    assert pool.next_done(0.01) is None
    pool.close()
    assert (tmp_path / "closed").read_text() == "xxxx", "expected those of three threads, and the broken one"


def test_a_local_pool_replaces_a_broken_evaluator(tmp_path: Path) -> None:
    """And stops if it cannot, instead of failing every later candidate."""
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path), "most": 2}, 1)
    submit(pool, "raise-1", "ok-2")
    assert drain(pool, 2)["ok-2"].status is Status.OK
    assert (tmp_path / "closed").exists()
    assert len((tmp_path / "made").read_text()) == 2
    submit(pool, "raise-3", "ok-4")
    drain(pool, 1)
    with pytest.raises(EngineError, match="the device is gone"):
        pool.next_done(10)
    pool.close()


def test_code_that_exits_the_program_ends_neither_the_pool_nor_the_search(tmp_path: Path) -> None:
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 1)
    submit(pool, "exit-1", "ok-2")
    results = drain(pool, 2)
    assert (results["exit-1"].error, results["ok-2"].status) == ("SystemExit: no such program", Status.OK)
    pool.close()
    with pytest.raises(EngineError, match=r"its code exits the program \(no such program\)"):
        LocalPool(EXITING, {}, 1).next_done(10)


def test_a_closing_local_pool_finishes_running_evaluations_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def say(message: str, *values: object) -> None:
        said.append(message % values)
        threading.Timer(0.2, (tmp_path / "wait-1-no-more").touch).start()

    monkeypatch.setattr("evomerge.cluster.local_pool.logger.warning", say)
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 1)
    submit(pool, "wait-1", "ok-2", "ok-3")
    while not (tmp_path / "wait-1").exists():
        time.sleep(0.01)
    pool.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "made", "wait-1", "wait-1-no-more"]
    assert said == ["waiting up to 5 s for running evaluations, so that their engines are freed"]


def test_a_closing_local_pool_waits_longer_for_engines_than_for_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of evaluations are not recorded by then, whereas an engine that is not freed may leave processes and shared memory."""
    monkeypatch.setattr("evomerge.cluster.local_pool.RUNNING_S", 0.1)
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 1)
    submit(pool, "wait-1")
    while not (tmp_path / "wait-1").exists():
        time.sleep(0.01)
    pool.close()
    assert not (tmp_path / "closed").exists()
    pool = LocalPool(ALONE, {"folder": str(tmp_path), "closing_s": 1.0}, 2)
    with pytest.raises(FileExistsError):
        pool.next_done(60)  # one of the two fails
    submit(pool, "ok-1")
    drain(pool, 1)
    pool.close()
    assert (tmp_path / "closed").exists()


def test_a_closing_local_pool_does_not_wait_longer_for_engines_that_are_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"RUNNING_S": 0.1, "SILENT_S": 0.0, "CLOSING_S": 1.0}.items():
        monkeypatch.setattr(f"evomerge.cluster.local_pool.{name}", value)
    pool = LocalPool(SLOW, {"folder": str(tmp_path)}, 1)
    while not (tmp_path / "starting").exists():
        time.sleep(0.01)
    pool.close()
    assert [message.partition(" for ")[0] for message in caplog.messages] == ["waiting up to 0.1 s"]


def test_local_pool_reports_an_evaluator_that_cannot_be_made() -> None:
    pool = LocalPool(UNLOADABLE, {}, 1)
    with pytest.raises(CheckpointError, match="holds NaN"):
        pool.next_done(10)
