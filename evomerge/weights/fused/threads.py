"""Runs compiled kernels, which release the interpreter lock, over chunks of work in several threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from itertools import pairwise
from threading import Condition
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_PARTS_PER_THREAD = 4
"""number of parts per thread, so that one slow core does not hold up the others"""


class Threads:
    """A fixed number of worker threads.

    Args:
        count: None = as many as torch uses (`OMP_NUM_THREADS`). With one, work is done in the caller's thread.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or torch.get_num_threads()
        self._executor = ThreadPoolExecutor(self.count, "evomerge-merge") if self.count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of every item, in order."""
        with self.work() as work:
            results = [work.start(function, item) for item in items]
        return [result.result() for result in results]

    def run_chunks(self, kernel: Callable[..., Any], chunks: np.ndarray, *arguments: Any) -> None:
        """Like `Work.start_chunks`, but waits for the result."""
        with self.work() as work:
            work.start_chunks(kernel, chunks, *arguments)

    def work(self) -> "Work":
        """A context in which work can be started."""
        return Work(self._executor, self.count * _PARTS_PER_THREAD)


class Work:
    """Work done in threads while the caller continues; the end of the `with` block waits for all of it.

    If the block fails or is interrupted, its memory, which the kernels access by address, is released: work that has not begun is then skipped.
    """

    def __init__(self, executor: Executor | None, n_parts: int) -> None:
        self._executor = executor
        self._n_parts = n_parts
        self._gate = _Gate()
        self._started: list[Future[Any]] = []

    def start(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Start `function`."""

        def one() -> Result:
            with self._gate:
                return function(*arguments)

        if self._executor is None:
            future: Future[Result] = Future()
            future.set_result(one())
            return future
        future = self._executor.submit(one)
        self._started.append(future)
        return future

    def start_chunks(self, kernel: Callable[..., Any], chunks: np.ndarray, *arguments: Any) -> None:
        """Start `kernel(part, *arguments)` for consecutive parts of `chunks` with nearly equal numbers of elements. A single chunk is computed at once."""
        if self._executor is None or len(chunks) < 2:
            kernel(chunks, *arguments)
            return
        done = np.cumsum(chunks["end"] - chunks["start"])
        n_parts = min(len(chunks), self._n_parts)
        cuts = np.searchsorted(done, done[-1] * np.arange(1, n_parts) / n_parts)
        edges = np.unique([0, *cuts.tolist(), len(chunks)])
        for first, last in pairwise(edges):
            self.start(kernel, chunks[first:last], *arguments)

    def __enter__(self) -> "Work":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for future in self._started:
                    future.result()
        finally:
            self._gate.close()


class _Gate:
    """Lets work begin until it is closed; closing waits for work in progress. (Futures do not suffice: one can be lost if `submit` is interrupted.)"""

    def __init__(self) -> None:
        self._changed = Condition()
        self._n_inside = 0
        self._is_closed = False

    def __enter__(self) -> None:
        with self._changed:
            if self._is_closed:
                raise CancelledError
            self._n_inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._n_inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Prevent new work from beginning, and wait for all work in progress."""
        with self._changed:
            self._is_closed = True
            try:
                self._changed.wait_for(lambda: self._n_inside == 0)
            finally:
                if self._n_inside:  # interrupted once more
                    self.close()
