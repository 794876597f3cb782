"""Maps a function over item numbers in forked copies of this process. For the sandbox, which has no threads that could hold locks.

Knows nothing of tasks.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

ALONE_S = 0.1
"""Seconds of work done in this process first; less is not worth forking a process of hundreds of megabytes."""

_function: Callable[[int], Any]
"""the function that the copies call; they inherit it, so it need not be picklable"""


def forked_map(function: Callable[[int], Any], count: int, processes: int) -> list[Any]:
    """`[function(0), ..., function(count - 1)]`: computed in this process for `ALONE_S` seconds, and the rest in `processes` forked copies.

    Raises:
        BrokenProcessPool: a copy died.
        Exception: the first exception of `function`, in order of the numbers.
    """
    global _function
    _function = function
    results: list[Any] = []
    started = time.monotonic()
    while len(results) < count and (processes == 1 or time.monotonic() - started < ALONE_S):
        results.append(function(len(results)))
    rest = range(len(results), count)
    if rest:
        with ProcessPoolExecutor(min(processes, len(rest)), mp_context=get_context("fork")) as pool:
            results += pool.map(_call, rest)
    return results


def _call(number: int) -> Any:
    return _function(number)
