"""How a signal that asks the program to leave affects errors of processes that received it too."""

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


def test_a_failure_after_sigterm_counts_as_an_interrupt() -> None:
    with pytest.raises(Interrupted):
        fail_after(signal.SIGTERM)


def test_a_failure_while_a_search_winds_down_after_sigint_is_an_error() -> None:
    with pytest.raises(EngineError):
        fail_after(signal.SIGINT)
