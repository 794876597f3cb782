"""What Ctrl-C, SIGTERM and SIGHUP (a closed terminal) do to a run.

Everything finished is durable already; they decide what happens to what is still running.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from evomerge.core import EngineError
from evomerge.search import Interrupted, StopRequest


@contextmanager
def signals(stop: StopRequest, *, abandon: bool) -> Iterator[None]:
    """Handles signals until the end of the block, in the main thread; elsewhere nothing is done.

    First SIGINT: ask nothing more and take in what runs (`abandon`: do not wait for it). Second SIGINT, SIGTERM, or SIGHUP where nohup does
    not have it ignored: leave at the next poll. A signal to leave has often reached Ray and the workers too.

    Raises:
        Interrupted: an engine or Ray has failed after a signal to leave.
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
