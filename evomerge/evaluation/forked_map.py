"""A function of numbers, worked out in several forked copies of this process. For the sandbox, which has no threads that hold locks.

Knows nothing of tasks.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

_function: Callable[[int], float]
"""what the copies call; they inherit it, so that it need not be picklable"""


def forked_map(function: Callable[[int], float], count: int, processes: int) -> list[float]:
    """`[function(0), ..., function(count - 1)]`. The first exception, in that order, is raised; one process is this one.

    Raises:
        BrokenProcessPool: a copy has died.
    """
    global _function
    if min(processes, count) <= 1:
        return [function(number) for number in range(count)]
    _function = function
    with ProcessPoolExecutor(min(processes, count), mp_context=get_context("fork")) as pool:
        return list(pool.map(_call, range(count)))


def _call(number: int) -> float:
    return _function(number)
