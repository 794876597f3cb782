"""`workers: auto` on nodes of different sizes that come and go, with engines that share a GPU. The GPUs exist only as a count."""

import os
import subprocess
import sys
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


class _Asked:
    """What a pool was asked, and what came back. Candidates take a second each."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.names: list[str] = []
        self.results: list[Evaluation] = []
        self.lost: list[LostWorker] = []

    def ask(self, count: int) -> None:
        new = [f"slow-{len(self.names) + index}" for index in range(count)]
        self.names += new
        for name in new:
            self._pool.submit(EvaluationRequest(name, Split.SEARCH))

    def take(self, wanted: int) -> None:
        """Waits until there are `wanted` results in total."""
        deadline = time.monotonic() + 90
        while len(self.results) < wanted:
            assert time.monotonic() < deadline, f"{len(self.results)} of {wanted} came back"
            answer = self._pool.next_done(0.2)
            if isinstance(answer, LostWorker):
                self.lost.append(answer)
            elif answer is not None:
                self.results.append(answer)

    def workers(self, wanted: int) -> set[tuple[float, float]]:
        """(process, GPU) of `wanted` workers that answer from now on; they are kept busy however long the last one takes to start."""
        found: set[tuple[float, float]] = set()
        while len(found) < wanted:
            self.ask(1)
            self.take(len(self.results) + 1)
            found.add((self.results[-1].cost["pid"], self.results[-1].cost["gpu"]))
        return found


def _places() -> list[str]:
    """The states of the places that the pool has reserved or wants to reserve."""
    from ray.util import placement_group_table

    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_workers_follow_the_nodes(cluster: Any, tmp_path: Path) -> None:
    pool = _pool(tmp_path)
    asked = _Asked(pool)
    asked.ask(6)
    assert pool.n_workers == 1, "nothing fits on a head without GPUs, so one worker should wait"
    assert pool.next_done(3) is None
    assert _places() == ["PENDING"], "an autoscaler must see what the worker waits for"

    add_node(cluster, num_cpus=4, num_gpus=1)
    assert {gpu for _, gpu in asked.workers(2)} == {0}, "both should see the same GPU"
    assert pool.n_workers == 2, "four CPUs, but only one GPU for two engines"

    leaving = add_node(cluster, num_cpus=1, num_gpus=2)
    asked.workers(3)
    assert pool.n_workers == 3, "two GPUs, but only one CPU for one engine"

    cluster.remove_node(leaving, allow_graceful=False)
    asked.take(len(asked.names))
    assert Counter(result.candidate_id for result in asked.results) == Counter(asked.names)
    assert {result.status for result in asked.results} == {Status.OK}
    assert asked.lost == [], "candidates lost with a node should be retried without blame"
    deadline = time.monotonic() + 90
    while pool.n_workers > 2:
        assert time.monotonic() < deadline, "the worker of the removed node was not given up"
        pool.next_done(0.5)
    assert _places() == ["CREATED"] * 2, "a place is still reserved for it"

    add_node(cluster, num_cpus=1, num_gpus=2)
    asked.ask(6)
    asked.workers(3)
    pool.close()
    assert _places() == []


ALONE = """
import os
from evomerge.cluster.nodes import start_cluster

cluster = start_cluster()
print(cluster.address.rpartition(":")[0], os.environ["RAY_AUTH_MODE"])
cluster.shutdown()
"""


def test_a_trial_cluster_listens_on_this_machine_only() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.strip() == "127.0.0.1 token", done.stderr
