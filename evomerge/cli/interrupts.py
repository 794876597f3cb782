"""What Ctrl-C, SIGTERM and SIGHUP (a closed terminal) do to a command: KeyboardInterrupt, and exit code 130.

So what is half done is removed. A search has handlers of its own while candidates are evaluated (`evomerge.build.commands.signals`).
Imports nothing heavy: this is in force before anything else is imported.
"""

import os
import signal
import sys
import weakref
from types import CodeType, FrameType

EXIT_INTERRUPTED = 130

_LOOK_AGAIN_S = 0.02

_LOST_AFTER_S = 1.0
"""An exception of which nothing is seen any more after this long was swallowed: C and C++ replace it by errors of their own."""

_HELD_UP_IN = {"<frozen importlib._bootstrap>", weakref.__file__}
"""Code from which the exception must not come. C++ that calls Python while a module is initialised, as torch's does, aborts the process
when that raises; what a finalizer raises is lost, as what `__del__` does."""

_SOBOL = os.path.join("scipy", "stats", "_qmc.py")
"""End of the name of such a file: what is raised while its Cython reads its table is printed and lost."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def take_interrupts() -> None:
    """From here on the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt in the main thread, and the second ends the process.

    What is ignored (as SIGINT is in the background of a shell, SIGHUP by nohup) stays ignored. Child processes do not inherit this.
    """
    taken = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in taken}
    interrupt = _Interrupt(sys._getframe(1).f_code)
    for number in taken:
        signal.signal(number, interrupt)
    signal.signal(signal.SIGALRM, interrupt)

    def give_back() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)

    os.register_at_fork(after_in_child=give_back)


def was_interrupted() -> bool:
    """Whether a signal has asked for the end, so that whatever fails now fails of that."""
    handler = signal.getsignal(signal.SIGALRM)
    return isinstance(handler, _Interrupt) and handler.asked


def ignore_interrupts() -> None:
    """From here on the process is about to end by itself: a signal must not change how."""
    for number in (*_NUMBERS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


class _Interrupt:
    """The handler. `bottom`: the code that everything to be interrupted is called from."""

    def __init__(self, bottom: CodeType) -> None:
        self._bottom = bottom
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            if self.asked:
                os._exit(EXIT_INTERRUPTED)
            self.asked = True
        held_up = self._is_held_up(frame)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_S if held_up else _LOST_AFTER_S)
        if not held_up and not _is_under_way():
            raise KeyboardInterrupt

    def _is_held_up(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not self._bottom:
            file = frame.f_code.co_filename
            if file in _HELD_UP_IN or file.endswith(_SOBOL) or frame.f_code.co_name == "__del__":
                return True
            frame = frame.f_back
        return False


def _is_under_way() -> bool:
    """Whether something is being tidied up after the exception."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
