"""What a signal to leave does to the errors of what has got it too."""

import os
import signal

import pytest

from evomerge.build.commands.signals import signals
from evomerge.core import EngineError
from evomerge.search import Interrupted, StopRequest


def fail_after(number: int) -> None:
    with signals(StopRequest(), abandon=False):
        os.kill(os.getpid(), number)
        raise EngineError("cannot start Ray on this machine")


def test_what_fails_after_a_signal_to_leave_is_an_interrupt() -> None:
    with pytest.raises(Interrupted):
        fail_after(signal.SIGTERM)


def test_what_fails_while_a_search_ends_is_an_error() -> None:
    with pytest.raises(EngineError):
        fail_after(signal.SIGINT)
