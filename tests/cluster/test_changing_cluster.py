"""`workers: auto` on nodes of different sizes that come and go, with engines that share a GPU. The GPUs are only counted."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.cluster.nodes import add_node, start_cluster
from evomerge.cluster.ray_session import RaySession
from evomerge.core import Evaluation, EvaluationRequest, LostWorker, Split, Status


@pytest.fixture
def cluster() -> Iterator[Any]:
    cluster = start_cluster(num_cpus=2)
    with RaySession(cluster.address):
        yield cluster
    cluster.shutdown()


def _pool(folder: Path) -> Any:
    from evomerge.cluster.ray_pool import RayPool, WorkerOptions

    options = WorkerOptions(
        n_workers=None,
        cpus=1,
        gpus=0.5,
        environment={},
        max_attempts=2,
        evaluation_timeout_s=60,
        startup_timeout_s=60,
        log_folder=None,
    )
    return RayPool("tests.cluster.workers:scripted", {"folder": str(folder)}, options)


def _until(pool: Any, wanted: int, results: list[Evaluation], lost: list[LostWorker]) -> None:
    """Adds what comes back until there are so many results."""
    deadline = time.monotonic() + 90
    while len(results) < wanted:
        assert time.monotonic() < deadline, f"{len(results)} of {wanted} came back"
        answer = pool.next_done(0.2)
        if isinstance(answer, LostWorker):
            lost.append(answer)
        elif answer is not None:
            results.append(answer)


def _until_workers(pool: Any, wanted: int, results: list[Evaluation], lost: list[LostWorker]) -> None:
    """Adds what comes back until it comes from so many workers."""
    while len({result.cost["pid"] for result in results}) < wanted:
        _until(pool, len(results) + 1, results, lost)


def _places() -> list[str]:
    """The states of what the pool has reserved, or wants to."""
    from ray.util import placement_group_table

    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_workers_follow_the_nodes(cluster: Any, tmp_path: Path) -> None:
    pool = _pool(tmp_path)
    results: list[Evaluation] = []
    lost: list[LostWorker] = []
    names = [f"slow-{index}" for index in range(16)]
    for name in names:
        pool.submit(EvaluationRequest(name, Split.SEARCH))
    assert pool.n_workers == 1, "nothing fits on a head without GPUs: one worker waits"
    assert pool.next_done(3) is None
    assert _places() == ["PENDING"], "an autoscaler sees what it waits for"

    add_node(cluster, num_cpus=4, num_gpus=1)
    _until(pool, 4, results, lost)
    assert pool.n_workers == 2, "four CPUs, but one GPU for two engines"
    first = {(result.cost["pid"], result.cost["gpu"]) for result in results}
    assert len(first) == 2
    assert {gpu for _, gpu in first} == {0}, "both see the same GPU"

    leaving = add_node(cluster, num_cpus=1, num_gpus=2)
    _until_workers(pool, 3, results, lost)
    assert pool.n_workers == 3, "two GPUs, but one CPU for one engine"

    cluster.remove_node(leaving, allow_graceful=False)
    _until(pool, len(names), results, lost)
    assert Counter(result.candidate_id for result in results) == Counter(names)
    assert {result.status for result in results} == {Status.OK}
    assert lost == [], "whoever was lost with a node is tried again without blame"
    deadline = time.monotonic() + 30
    while pool.n_workers > 2:
        assert time.monotonic() < deadline, "the worker of the node that went is given up"
        pool.next_done(0.5)
    assert _places() == ["CREATED"] * 2, "nothing is kept for it"

    add_node(cluster, num_cpus=1, num_gpus=2)
    for index in range(16):
        pool.submit(EvaluationRequest(f"slow-again-{index}", Split.SEARCH))
    again: list[Evaluation] = []
    _until_workers(pool, 3, again, lost)
    pool.close()
    assert _places() == []
