"""Handlers of Ctrl-C, SIGTERM and SIGHUP (a closed terminal) during a run.

Finished evaluations are already durable; the signals decide what happens to those still running.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from evomerge.core import EngineError
from evomerge.search import Interrupted, StopRequest


@contextmanager
def signals(stop: StopRequest, *, abandon: bool) -> Iterator[None]:
    """A context manager that handles signals in the main thread; does nothing in other threads.

    First SIGINT: propose nothing more and wait for running evaluations (`abandon`: do not wait). Second SIGINT, SIGTERM, or SIGHUP unless nohup
    ignores it: leave at the next poll. Such a signal has often reached Ray and the workers too.

    Raises:
        Interrupted: an engine or Ray failed after a signal to leave.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        stop.now = stop.now or abandon or stop.drain or number != signal.SIGINT
        stop.drain = True

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    except EngineError as problem:
        if stop.now:
            raise Interrupted from problem
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
