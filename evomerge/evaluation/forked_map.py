"""A function of item numbers, worked out in several forked copies of this process. For the sandbox, which has no threads that hold locks.

Knows nothing of tasks.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

ALONE_S = 0.1
"""What takes no longer is not worth copying a process of hundreds of megabytes for."""

_function: Callable[[int], Any]
"""what the copies call; they inherit it, so that it need not be picklable"""


def forked_map(function: Callable[[int], Any], count: int, processes: int) -> list[Any]:
    """`[function(0), ..., function(count - 1)]`: the first of them here, and after `ALONE_S` the rest in `processes` copies.

    Raises:
        BrokenProcessPool: a copy has died.
        Exception: the first, in that order, that the function raises.
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
