"""Running compiled kernels, which hold no interpreter lock, over chunks of work in several threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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
        return list(self._executor.map(function, items))

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
        list(self._executor.map(lambda part: kernel(part, *arguments), parts))
