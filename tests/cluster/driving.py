"""Submitting work to a pool and waiting for its results."""

import time

from evomerge.cluster import LocalPool
from evomerge.core import Evaluation, EvaluationRequest, LostWorker, Split

SCRIPTED = "tests.cluster.workers:scripted"
UNLOADABLE = "tests.cluster.workers:unloadable"
ALONE = "tests.cluster.workers:alone"
EXITING = "tests.cluster.workers:exiting"
CRASHING = "tests.cluster.workers:crashing"
SLOW = "tests.cluster.workers:slow"
PATIENCE_S = 300  # a worker takes up to half a minute to start on a busy machine, and some tests start five
LOST: list[LostWorker] = []
"""the losses that `drain` saw"""


def drain(pool: LocalPool, count: int, timeout_s: float = PATIENCE_S) -> dict[str, Evaluation]:
    """The next `count` results, by candidate."""
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
