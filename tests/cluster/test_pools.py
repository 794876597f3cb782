"""Both pools keep the same promises; the Ray pool also survives its workers."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from evomerge.cluster import LocalPool
from evomerge.core import (
    CheckpointError,
    EngineError,
    Evaluation,
    EvaluationRequest,
    LostWorker,
    Split,
    Status,
)

SCRIPTED = "tests.cluster.workers:scripted"
UNLOADABLE = "tests.cluster.workers:unloadable"
SLOW = "tests.cluster.workers:slow"
LOST: list[LostWorker] = []


def drain(pool: LocalPool, count: int, timeout_s: float = 90) -> dict[str, Evaluation]:
    """The next `count` results by candidate."""
    results: dict[str, Evaluation] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < count:
        assert time.monotonic() < deadline, f"only {sorted(results)} came back"
        evaluation = pool.next_done(0.2)
        if isinstance(evaluation, LostWorker):
            LOST.append(evaluation)
        elif evaluation is not None:
            assert evaluation.candidate_id not in results, "a result came twice"
            results[evaluation.candidate_id] = evaluation
    return results


def submit(pool: LocalPool, *names: str) -> None:
    for name in names:
        pool.submit(EvaluationRequest(name, Split.SEARCH))


def test_local_pool_evaluates_everything_once(tmp_path: Path) -> None:
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 3)
    submit(pool, *(f"ok-{index}" for index in range(20)), "raise-1")
    results = drain(pool, 21)
    assert results.pop("raise-1").error == "RuntimeError: scripted\n  in two lines"
    assert {result.status for result in results.values()} == {Status.OK}
    assert pool.next_done(0.01) is None
    pool.close()


def test_a_local_pool_makes_a_broken_evaluator_anew(tmp_path: Path) -> None:
    """And stops where it cannot, instead of failing every candidate to come."""
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


def test_a_closing_local_pool_ends_what_runs_and_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 1)
    submit(pool, "slow-1", "ok-2", "ok-3")
    while not (tmp_path / "slow-1").exists():
        time.sleep(0.01)
    pool.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "made", "slow-1"]
    assert caplog.messages == ["waiting up to 5 s for the evaluations that run, so that their engines are freed"]


def test_a_closing_local_pool_waits_longer_for_engines_than_for_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an evaluation gives then is not recorded; an engine that is not freed may leave processes and shared memory."""
    monkeypatch.setattr("evomerge.cluster.local_pool.RUNNING_S", 0.1)
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 1)
    submit(pool, "slow-1")
    while not (tmp_path / "slow-1").exists():
        time.sleep(0.01)
    pool.close()
    assert not (tmp_path / "closed").exists()
    pool = LocalPool(SCRIPTED, {"folder": str(tmp_path), "closing_s": 1.0}, 1)
    submit(pool, "ok-1")
    drain(pool, 1)
    pool.close()
    assert (tmp_path / "closed").exists()


def test_local_pool_reports_an_evaluator_that_cannot_be_made() -> None:
    pool = LocalPool(UNLOADABLE, {}, 1)
    with pytest.raises(CheckpointError, match="holds NaN"):
        pool.next_done(10)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    from evomerge.cluster.ray_session import RaySession

    with RaySession(None, n_cpus=4):
        yield


def ray_pool(
    factory: str,
    folder: Path,
    n_workers: int = 2,
    evaluation_timeout_s: float = 60,
    startup_timeout_s: float = 60,
    versions: Mapping[str, str] | None = None,
) -> LocalPool:
    from evomerge.cluster.ray_pool import RayPool, WorkerOptions

    options = WorkerOptions(
        n_workers=n_workers,
        cpus=1,
        gpus=0,
        environment={"PYTHONPATH": str(Path.cwd()), "EVOMERGE_TEST": "1"},
        max_attempts=2,
        evaluation_timeout_s=evaluation_timeout_s,
        startup_timeout_s=startup_timeout_s,
        log_folder=str(folder),
        versions=versions or {},
    )
    return RayPool(factory, {"folder": str(folder)}, options)  # type: ignore[return-value]


@pytest.mark.usefixtures("ray_session")
def test_ray_pool_survives_dying_workers(tmp_path: Path) -> None:
    LOST.clear()
    pool = ray_pool(SCRIPTED, tmp_path)
    submit(pool, "ok-1", "die-once-1", "die-always", "ok-2", "raise-1", "ok-3")
    results = drain(pool, 6)
    pool.close()
    assert [results[name].status for name in ("ok-1", "ok-2", "ok-3", "die-once-1")] == [Status.OK] * 4
    assert results["die-always"].status is Status.FAILED
    assert "quarantined: 2 workers were lost with it" in str(results["die-always"].error)
    assert sorted(item.candidate_id for item in LOST) == [
        *("die-always", "die-always", "die-once-1"),
        *("raise-1", "raise-1"),
    ]
    assert results["ok-1"].cost["garbage"] == 50_000
    assert results["raise-1"].status is Status.FAILED
    assert "RuntimeError: scripted in two lines" in str(results["raise-1"].error)
    assert (tmp_path / "die-once-1").read_text() == "xx"
    assert (tmp_path / "ok-1").read_text() == "x"


@pytest.mark.usefixtures("ray_session")
def test_ray_s_head_keeps_nothing_of_what_was_evaluated(tmp_path: Path) -> None:
    import ray

    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1)
    submit(pool, *(f"ok-{index}" for index in range(10)))
    drain(pool, 10)
    time.sleep(2)  # workers report every second
    kept = [event for event in ray.timeline() if "evaluate" in event["name"]]
    pool.close()
    assert kept == [], "it would grow by 3 kB with every candidate"


@pytest.mark.usefixtures("ray_session")
def test_ray_pool_replaces_a_hung_worker_and_stragglers_block_nobody(tmp_path: Path) -> None:
    pool = ray_pool(SCRIPTED, tmp_path, evaluation_timeout_s=3)
    submit(pool, "hang-1", *(f"ok-{index}" for index in range(5)))
    quick = drain(pool, 5)
    assert all(name.startswith("ok") for name in quick)
    assert "took more than 3 s" in str(drain(pool, 1)["hang-1"].error)
    submit(pool, "ok-last")
    assert drain(pool, 1)["ok-last"].status is Status.OK
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_ray_pool_says_why_a_worker_cannot_start(tmp_path: Path) -> None:
    pool = ray_pool(UNLOADABLE, tmp_path, n_workers=1)
    with pytest.raises(CheckpointError, match="tensor 'x' holds NaN"):
        drain(pool, 1)
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_of_several_machines_the_one_to_be_mended_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    pool = ray_pool(UNLOADABLE, tmp_path, n_workers=1)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {}, "NodeID": name} for name in "ab"])
    with pytest.raises(CheckpointError, match=f"^on {socket.gethostname()}: model.safetensors: tensor 'x' holds NaN"):
        drain(pool, 1)
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_machine_with_other_versions_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numpy = version("numpy")
    pool = ray_pool(SCRIPTED, tmp_path, versions={"ray": "1.0", "numpy": f"{numpy}+cpu", "nothing-of-this-name": "1.0"})
    submit(pool, *(f"slow-{index}" for index in range(3)))
    drain(pool, 3)
    pool.close()
    said = [record.getMessage() for record in caplog.records if "scores may differ" in record.getMessage()]
    assert said == [f"{socket.gethostname()} has ray {version('ray')} and not 1.0: scores may differ there"]


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_hangs_while_it_starts_is_given_up(tmp_path: Path) -> None:
    pool = ray_pool(SLOW, tmp_path, n_workers=1, startup_timeout_s=1)
    submit(pool, "ok-1")
    with pytest.raises(EngineError, match=r"worker 0 cannot start: the worker's start took more than 1 s"):
        drain(pool, 1)
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_candidate_that_has_cost_its_workers_before_is_not_tried_again(tmp_path: Path) -> None:
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1)
    pool.submit(EvaluationRequest("die-always", Split.SEARCH, attempt=2))
    assert "quarantined" in str(drain(pool, 1)["die-always"].error)
    assert not (tmp_path / "die-always").exists()
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_workers_wait_for_room_and_more_come_when_there_is_more(tmp_path: Path) -> None:
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=6)
    submit(pool, *(f"ok-{index}" for index in range(8)))
    pids = {result.cost["pid"] for result in drain(pool, 8).values()}
    assert len(pids) <= 4, "four CPUs hold four workers; the other two wait and nobody counts that as a failure"
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_nothing_listens_beyond_this_machine_and_a_token_is_needed() -> None:
    import psutil
    import ray

    me = psutil.Process()
    n_listening = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue  # it has ended since it was listed: what has gone does not listen
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                n_listening += 1
                assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (process.pid, connection)
    assert n_listening >= 2, "the head and the raylet listen, or nothing was looked at"
    address = ray.get_runtime_context().gcs_address
    code = (
        f"import ray; ray.init(address={address!r}, logging_level=50, log_to_driver=False)\n"
        "print('in', ray.cluster_resources()['CPU'], flush=True)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    wrong = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    stranger = subprocess.Popen(
        [sys.executable, "-c", code], env=wrong, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    friend = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert friend.stdout.startswith("in"), friend.stderr
    stranger.kill()  # it has had the time that the friend needed; Ray goes on trying for minutes
    assert b"in" not in stranger.communicate()[0]
