"""Threads that run compiled kernels: however the caller continues, none of them is still running by then."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from evomerge.weights.fused.threads import Threads


@pytest.fixture
def interrupt():
    """Calling `interrupt()` sends SIGINT to this process, which raises KeyboardInterrupt even if the shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("n_interrupts", [1, 3])
def test_interrupt_waits_for_running_work_and_starts_no_more(interrupt, n_interrupts) -> None:
    """Kernels write to memory by address, and the memory is freed when the caller gives up."""
    started, running, n_started = threading.Event(), set(), 0

    def kernel(part, name):
        nonlocal n_started
        n_started += 1
        running.add(threading.get_ident())
        started.set()
        time.sleep(0.5)
        running.remove(threading.get_ident())

    def interrupts():
        started.wait()
        for _ in range(n_interrupts):
            interrupt()
            time.sleep(0.1)

    threading.Thread(target=interrupts).start()
    chunks = np.zeros(8, [("start", np.int64), ("end", np.int64)])
    chunks["end"] = 1
    with pytest.raises(KeyboardInterrupt):
        Threads(2).run_chunks(kernel, chunks, "x")
    assert not running
    assert 0 < n_started <= 2


def test_failure_waits_for_running_work() -> None:
    done = []

    def work(number):
        if number == 0:
            raise ZeroDivisionError
        time.sleep(0.3)
        done.append(number)

    with pytest.raises(ZeroDivisionError):
        Threads(2).map(work, [0, 1])
    assert done in ([], [1])
    before = list(done)
    time.sleep(0.5)
    assert done == before
