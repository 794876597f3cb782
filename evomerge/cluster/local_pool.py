"""Workers inside this process, one thread each: for tests, for the synthetic evaluation, and for one light engine."""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from evomerge.cluster.worker import Evaluator, make_evaluator
from evomerge.core import EngineError, Evaluation, EvaluationRequest, Json

logger = logging.getLogger(__name__)

THREAD_NAME = "evomerge-worker"
"""prefix of the names of worker threads"""

CLOSING_S = 20.0
"""how long `close` waits for engines to be freed"""

RUNNING_S = 5.0
"""how long it waits for starting engines and running evaluations, whose results are dropped; less than service managers wait before they kill"""

SILENT_S = 0.5
"""how long it waits before it logs that it is waiting"""


class LocalPool:
    """A pool of threads, each with its own evaluator, which is replaced if it breaks.

    Args:
        factory, settings: the arguments with which a thread calls `make_evaluator`.
        n_workers: number of threads.

    Threads start in the background, so `next_done` raises the error of an evaluator that cannot be made.
    """

    def __init__(self, factory: str, settings: Mapping[str, Json], n_workers: int) -> None:
        self._factory, self._settings = factory, settings
        self.n_workers = n_workers
        self._requests: queue.SimpleQueue[EvaluationRequest | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Evaluation | Exception] = queue.SimpleQueue()
        self._running: set[str] = set()  # names of threads that are making an evaluator or evaluating
        self._threads = [
            threading.Thread(target=self._work, name=f"{THREAD_NAME}-{index}", daemon=True)
            for index in range(n_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: EvaluationRequest) -> None:
        """Queue a request."""
        self._requests.put(request)

    def next_done(self, timeout_s: float) -> Evaluation | None:
        """The next finished evaluation, or None. Raises the error of a worker that could not make or close its evaluator."""
        try:
            result = self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(result, Exception):
            raise result
        return result

    def withdraw(self) -> list[EvaluationRequest]:
        """Remove and return the requests that no thread has started."""
        withdrawn: list[EvaluationRequest] = []
        with suppress(queue.Empty):
            while (request := self._requests.get_nowait()) is not None:
                withdrawn.append(request)
        return withdrawn

    def close(self) -> None:
        """Drop queued requests and wait until the threads end: up to `RUNNING_S` while any is busy, otherwise up to `CLOSING_S`."""
        self.withdraw()
        for _ in self._threads:
            self._requests.put(None)
        started, said = time.monotonic(), False
        while any(thread.is_alive() for thread in self._threads):
            waited = time.monotonic() - started
            if waited > (RUNNING_S if self._running else CLOSING_S):
                return
            if self._running and waited > SILENT_S and not said:
                said = True
                logger.warning("waiting up to %g s for running evaluations, so that their engines are freed", RUNNING_S)
            time.sleep(0.01)

    def _work(self) -> None:
        try:
            evaluator = self._evaluator()
            while (request := self._requests.get()) is not None:
                with self._busy():
                    try:
                        self._results.put(evaluator.evaluate(request))
                        continue
                    except (Exception, SystemExit) as problem:  # noqa: BLE001  (the pool boundary)
                        self._results.put(request.failed(f"{type(problem).__name__}: {problem}"))
                # the evaluator is broken and would fail for every other candidate too
                evaluator.close()
                evaluator = self._evaluator()
            evaluator.close()
        except SystemExit as problem:
            self._results.put(EngineError(f"a worker cannot start or end: its code exits the program ({problem})"))
        except Exception as problem:  # noqa: BLE001  (the pool boundary: passed on to the driver)
            self._results.put(problem)

    def _evaluator(self) -> Evaluator:
        with self._busy():
            return make_evaluator(self._factory, self._settings)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Mark this thread as busy, so that `close` does not wait long for it."""
        name = threading.current_thread().name
        self._running.add(name)
        try:
            yield
        finally:
            self._running.discard(name)
