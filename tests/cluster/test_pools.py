"""The Ray pool: the guarantees of the local one, and that it survives the loss of its workers."""

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from evomerge.cluster import LocalPool
from evomerge.core import (
    CheckpointError,
    EngineError,
    EvaluationRequest,
    Split,
    Status,
)
from tests.cluster.driving import ALONE, CRASHING, LOST, PATIENCE_S, SCRIPTED, SLOW, UNLOADABLE, drain, submit

REST_S = 61
"""more than `evomerge.cluster.ray_pool.REST_S`"""


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    from evomerge.cluster.ray_session import RaySession

    with RaySession(None, n_cpus=4):
        yield


def ray_pool(factory: str, folder: Path, settings: Mapping[str, Any] | None = None, **different: Any) -> LocalPool:
    from evomerge.cluster.ray_pool import RayPool, WorkerOptions

    options: dict[str, Any] = {
        "n_workers": 2,
        "cpus": 1,
        "gpus": 0,
        "environment": {"PYTHONPATH": str(Path.cwd()), "EVOMERGE_TEST": "1"},
        "max_attempts": 2,
        "evaluation_timeout_s": 60,
        "startup_timeout_s": 60,
        "log_folder": str(folder),
    }
    settings = {"folder": str(folder), **(settings or {})}
    return RayPool(factory, settings, WorkerOptions(**options | different))  # type: ignore[return-value]


def until(pool: LocalPool, condition: Callable[[], bool]) -> None:
    """Lets the pool run, with nothing to evaluate, until the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        assert pool.next_done(0.2) is None


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", ["local", "ray"])
def test_work_that_no_worker_has_started_can_be_withdrawn(tmp_path: Path, kind: str) -> None:
    pool = (
        LocalPool(SCRIPTED, {"folder": str(tmp_path)}, 1)
        if kind == "local"
        else ray_pool(SCRIPTED, tmp_path, n_workers=1)
    )
    submit(pool, "wait-1")
    while not (tmp_path / "wait-1").exists():
        assert pool.next_done(0.05) is None
    submit(pool, "ok-2", "ok-3")
    assert [request.candidate_id for request in pool.withdraw()] == ["ok-2", "ok-3"]
    (tmp_path / "wait-1-no-more").touch()
    assert drain(pool, 1).keys() == {"wait-1"}
    assert pool.next_done(1.0) is None
    assert pool.withdraw() == []
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_ray_pool_survives_dying_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LOST.clear()
    pool = ray_pool(SCRIPTED, tmp_path)
    submit(pool, "ok-1", "die-once-1", "die-always", "ok-2", "raise-1", "ok-3")
    results = drain(pool, 6)
    pool.close()
    assert [results[name].status for name in ("ok-1", "ok-2", "ok-3", "die-once-1")] == [Status.OK] * 4
    assert results["die-always"].status is Status.FAILED
    assert "quarantined: 2 workers were lost while evaluating it; the last: the process was killed" in str(
        results["die-always"].error
    )
    assert f"or crashed; see {tmp_path}/worker-" in caplog.text
    lost = sorted(item.candidate_id for item in LOST)
    assert lost == ["die-always", "die-always", "die-once-1", "raise-1", "raise-1"]
    assert results["ok-1"].cost["garbage"] == 50_000
    assert results["ok-1"].cost["told"] == 1, "the worker was not given its environment variables"
    assert results["raise-1"].status is Status.FAILED
    assert str(results["raise-1"].error).endswith("; the last: RuntimeError: scripted in two lines")
    assert (tmp_path / "die-once-1").read_text() == "xx"
    assert (tmp_path / "ok-1").read_text() == "x"


@pytest.mark.usefixtures("ray_session")
def test_rays_head_keeps_no_record_of_evaluations(tmp_path: Path) -> None:
    import ray

    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1)
    submit(pool, *(f"ok-{index}" for index in range(10)))
    drain(pool, 10)
    time.sleep(2)  # workers report once a second
    kept = [event for event in ray.timeline() if "evaluate" in event["name"]]
    pool.close()
    assert kept == [], "it would grow by 3 kB per candidate"


@pytest.mark.usefixtures("ray_session")
def test_ray_pool_replaces_a_hung_worker_and_stragglers_block_no_one(tmp_path: Path) -> None:
    pool = ray_pool(
        SCRIPTED, tmp_path, cpus=2, evaluation_timeout_s=5
    )  # a hung worker that kept its CPUs would leave too few for its replacement
    made = tmp_path / "made"
    until(pool, lambda: made.exists() and made.read_text() == "xx")
    submit(pool, "hang-1", *(f"ok-{index}" for index in range(5)))
    quick = drain(pool, 5)
    assert all(name.startswith("ok") for name in quick)
    assert "took more than 5 s" in str(drain(pool, 1)["hang-1"].error)
    submit(pool, "ok-last")
    assert drain(pool, 1)["ok-last"].status is Status.OK
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_ray_pool_says_why_a_worker_cannot_start(tmp_path: Path) -> None:
    pool = ray_pool(UNLOADABLE, tmp_path, n_workers=1)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: tensor 'x' holds NaN"):
        drain(pool, 1)
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_all_output_of_a_worker_is_in_its_log(tmp_path: Path) -> None:
    """Including what C libraries write, and the output of a worker that was replaced or whose evaluator could not be made."""
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1)
    submit(pool, "say-1", "die-once-1", "say-2")
    drain(pool, 3)
    pool.close()
    lines = (tmp_path / "worker-0.log").read_text().splitlines()
    said = [line.rpartition("say-")[2] for line in lines if "say-" in line]
    assert said == [f"{n} {what}" for n in (1, 2) for what in ("prints", "logs", "writes", "complains")]
    assert any(line.endswith("INFO scripted: say-1 logs") for line in lines), "the name of the logger is missing"
    pool = ray_pool(UNLOADABLE, tmp_path, n_workers=1)
    with pytest.raises(CheckpointError):
        drain(pool, 1)
    pool.close()
    log = (tmp_path / "worker-0.log").read_text()
    assert "the evaluator cannot be made\nTraceback" in log


@pytest.mark.usefixtures("ray_session")
def test_of_several_machines_the_one_to_be_fixed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert said == [f"{socket.gethostname()} has ray {version('ray')} instead of 1.0: its scores may differ"]


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_hangs_on_startup_is_given_up(tmp_path: Path) -> None:
    pool = ray_pool(SLOW, tmp_path, n_workers=1, startup_timeout_s=1)
    submit(pool, "ok-1")
    with pytest.raises(EngineError, match=r"worker 0 cannot start: the worker's start took more than 1 s"):
        drain(pool, 1)
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_candidate_that_used_up_its_workers_before_is_not_retried(tmp_path: Path) -> None:
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1)
    pool.submit(EvaluationRequest("die-always", Split.SEARCH, attempt=2))
    assert "quarantined" in str(drain(pool, 1)["die-always"].error)
    assert not (tmp_path / "die-always").exists()
    pool.close()
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1, max_attempts=1)
    submit(pool, "die-always", "raise-long", "ok-1")
    results = drain(pool, 3)
    assert [result.status for result in results.values()] == [Status.FAILED, Status.FAILED, Status.OK]
    assert 500 < len(str(results["raise-long"].error)) < 600
    assert (tmp_path / "die-always").read_text() == "x"
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_has_worked_before_is_restarted_after_any_failure(tmp_path: Path) -> None:
    """What fails then may go away, such as memory that the previous worker has not released yet; and each start gets all its attempts."""
    pool = ray_pool(SCRIPTED, tmp_path, {"not": [1, 3]}, n_workers=1)
    submit(pool, "die-once-1", "ok-1", "ok-2")
    assert list(drain(pool, 3)) == ["die-once-1", "ok-1", "ok-2"], "lost work should come first"
    assert (tmp_path / "made").read_text() == "xxxx"
    pool.close()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the pool's clock by the given number of seconds."""
    ahead = [0.0]
    now = time.monotonic
    monkeypatch.setattr("evomerge.cluster.ray_pool.time.monotonic", lambda: now() + sum(ahead))
    return ahead.append


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_cannot_start_pauses_while_another_works(
    tmp_path: Path, later: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    pool = ray_pool(ALONE, tmp_path)

    def failures() -> int:
        return sum(
            "FileExistsError" in message and message.startswith("replacing worker") for message in caplog.messages
        )

    until(pool, lambda: failures() == 2)
    for _ in range(3):
        assert pool.n_workers == 1
        later(5)
        assert pool.next_done(0) is None
    submit(pool, "ok-1")
    assert drain(pool, 1)["ok-1"].status is Status.OK
    later(REST_S)
    until(pool, lambda: failures() == 3)
    assert pool.n_workers == 1, "it should have tried once more and paused again"
    (tmp_path / "alone").unlink()
    later(REST_S)
    until(pool, (tmp_path / "alone").exists)
    assert pool.n_workers == 2
    pids = set[float]()
    while len(pids) < 2:
        submit(pool, f"slow-{len(pids)}", f"slow-{len(pids)}-too")
        pids |= {result.cost["pid"] for result in drain(pool, 2).values()}
    assert {path.name for path in tmp_path.glob("*.log")} == {"worker-0.log", "worker-1.log"}
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_cannot_start_does_not_end_a_search_while_another_is_starting(tmp_path: Path) -> None:
    pool = ray_pool(CRASHING, tmp_path)
    until(pool, lambda: pool.n_workers == 1)
    (tmp_path / "starting-no-more").touch()
    submit(pool, "ok-1")
    assert drain(pool, 1)["ok-1"].status is Status.OK
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_time_spent_waiting_for_a_place_is_not_startup_time(tmp_path: Path, later: Callable[[float], None]) -> None:
    other = ray_pool(SCRIPTED, tmp_path, n_workers=1, cpus=4)
    submit(other, "ok-other")
    drain(other, 1)  # so that it holds the place
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1, cpus=4, max_attempts=1)
    for _ in range(3):
        later(1000)
        assert pool.next_done(0.1) is None
    other.close()
    later(1000)  # the pool looks at once, and finds the place before the worker is ready
    submit(pool, "ok-1")
    assert drain(pool, 1)["ok-1"].status is Status.OK
    pool.close()
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1, cpus=400, max_attempts=1, startup_timeout_s=0.5)
    assert pool.next_done(1) is None, "nor does the time before the first look for a place count"
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_free_worker_starts_as_soon_as_work_is_submitted(tmp_path: Path) -> None:
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1)
    submit(pool, "ok-1")
    drain(pool, 1)
    submit(pool, "ok-2")
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "ok-2").exists():
        assert time.monotonic() < deadline, "it did not start until results were asked for"
        time.sleep(0.05)
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_candidate_lost_with_every_node_fails_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.cluster.ray_pool.MAX_NODE_LOSSES", 3)
    monkeypatch.setattr("evomerge.cluster.ray_pool.RayPool._lost_its_node", lambda *_: True)
    pool = ray_pool(
        SCRIPTED, tmp_path, {"not": [1]}, n_workers=1, max_attempts=1
    )  # lost nodes do not count as failed starts either
    submit(pool, "die-1", "ok-1")
    LOST.clear()
    results = drain(pool, 2)
    assert list(results) == ["die-1", "ok-1"]
    assert str(results["die-1"].error).startswith("lost with 3 nodes; the last: ")
    assert (tmp_path / "die-1").read_text() == "xxx"
    assert LOST == [], "node losses must not count against the candidate"
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_a_worker_lost_together_with_its_node_counts_as_a_node_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may report only the process as lost although the whole machine was."""
    import ray

    nodes = [{"NodeID": ray.get_runtime_context().get_node_id(), "Alive": False}, {"NodeID": "other", "Alive": True}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr("evomerge.cluster.ray_pool.MAX_NODE_LOSSES", 2)
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1, max_attempts=1)
    submit(pool, "die-1")
    assert str(drain(pool, 1)["die-1"].error).startswith("lost with 2 nodes; the last: ")
    pool.close()


@pytest.mark.usefixtures("ray_session")
def test_workers_wait_for_room_and_start_when_there_is_some(tmp_path: Path) -> None:
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=6)
    submit(pool, *(f"ok-{index}" for index in range(8)))
    pids = {result.cost["pid"] for result in drain(pool, 8).values()}
    assert len(pids) <= 4, "four CPUs hold four workers; the other two wait, which is no failure"
    pool.close()
    pool = ray_pool(SCRIPTED, tmp_path, n_workers=1, cpus=4)
    submit(pool, "ok-last")
    drain(pool, 1)  # no place is still taken
    pool.close()
