"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt in a command, which then exits with code 130.

This lets commands clean up unfinished output. While candidates are evaluated, a search installs its own handlers (`evomerge.build.commands.signals`).
Imports nothing heavy, since the handlers are installed before anything else is imported.
"""

import os
import signal
import sys
import weakref
from types import CodeType, FrameType

EXIT_INTERRUPTED = 130

_RETRY_AFTER_S = 0.02
"""how soon to try again if the exception could not be raised"""

_LOST_AFTER_S = 1.0
"""If the program is still running after this long and not handling the exception, the exception was swallowed (C and C++ code replaces it by its
own errors) and is raised again."""

_DEFER_IN = {"<frozen importlib._bootstrap>", weakref.__file__}
"""Code in which the exception must not be raised. C++ that calls Python while a module is initialised, as in torch, aborts the process if that call
raises; exceptions in finalizers are lost, as in `__del__`."""

_SOBOL = os.path.join("scipy", "stats", "_qmc.py")
"""End of the path of a file in which the exception must not be raised either: its Cython code prints and drops one raised while it reads its table."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def take_interrupts() -> None:
    """Make the first SIGINT, SIGTERM or SIGHUP raise KeyboardInterrupt in the main thread, and the second end the process.

    Ignored signals stay ignored (SIGINT in a shell's background jobs, SIGHUP under nohup). Forked child processes get the previous handlers back.
    """
    taken = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in taken}
    interrupt = _Interrupt(sys._getframe(1).f_code)
    for number in taken:
        signal.signal(number, interrupt)
    signal.signal(signal.SIGALRM, interrupt)

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)

    os.register_at_fork(after_in_child=restore)


def was_interrupted() -> bool:
    """Whether a signal has been received, so that any error now is a consequence of it."""
    handler = signal.getsignal(signal.SIGALRM)
    return isinstance(handler, _Interrupt) and handler.asked


def ignore_interrupts() -> None:
    """Ignore signals from here on: the process is about to exit, and a signal must not change its exit code."""
    for number in (*_NUMBERS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


class _Interrupt:
    """The handler. `bottom`: the code object at which the search of the stack for deferring code stops."""

    def __init__(self, bottom: CodeType) -> None:
        self._bottom = bottom
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            if self.asked:
                os._exit(EXIT_INTERRUPTED)
            self.asked = True
        deferred = self._must_defer(frame)
        signal.setitimer(signal.ITIMER_REAL, _RETRY_AFTER_S if deferred else _LOST_AFTER_S)
        if not deferred and not _is_being_handled():
            raise KeyboardInterrupt

    def _must_defer(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not self._bottom:
            file = frame.f_code.co_filename
            if file in _DEFER_IN or file.endswith(_SOBOL) or frame.f_code.co_name == "__del__":
                return True
            frame = frame.f_back
        return False


def _is_being_handled() -> bool:
    """Whether a KeyboardInterrupt is being handled, e.g. by code that cleans up."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
