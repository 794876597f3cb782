"""Running compiled kernels, which hold no interpreter lock, over chunks of work in several threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from threading import Condition
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_PARTS_PER_THREAD = 4
"""parts handed to each thread, so that one slow core does not hold up the rest"""


class Threads:
    """A fixed number of worker threads.

    Args:
        count: None = as many as torch uses (`OMP_NUM_THREADS`).
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or torch.get_num_threads()
        self._executor = ThreadPoolExecutor(self.count, "evomerge-merge") if self.count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of every item, in order."""
        if self._executor is None:
            return [function(item) for item in items]
        return self._all(self._executor, function, items)

    def run_chunks(self, kernel: Callable[..., Any], chunks: np.ndarray, *arguments: Any) -> None:
        """`kernel(part, *arguments)` for consecutive parts of `chunks` of about equal numbers of elements."""
        if self._executor is None or len(chunks) < 2:
            kernel(chunks, *arguments)
            return
        done = np.cumsum(chunks["end"] - chunks["start"])
        n_parts = min(len(chunks), self.count * _PARTS_PER_THREAD)
        cuts = np.searchsorted(done, done[-1] * np.arange(1, n_parts) / n_parts)
        edges = np.unique([0, *cuts.tolist(), len(chunks)])
        parts = [chunks[first:last] for first, last in pairwise(edges)]
        self._all(self._executor, lambda part: kernel(part, *arguments), parts)

    @staticmethod
    def _all(executor: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        gate = _Gate()

        def one(item: Item) -> Result:
            with gate:
                return function(item)

        try:
            return list(executor.map(one, items))
        finally:
            # whoever fails or is interrupted here lets go of memory that the kernels know by its address
            gate.close()


class _Gate:
    """Lets work begin until it is closed, which waits for what has begun. (Futures do not do: one may be lost where `submit` is interrupted.)"""

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
        """Nothing begins any more, and everything has ended when this returns."""
        with self._changed:
            self._is_closed = True
            try:
                self._changed.wait_for(lambda: self._n_inside == 0)
            finally:
                if self._n_inside:  # interrupted once more
                    self.close()
