"""SIGTERM stays this program's, while Ray starts, runs and after it has ended."""

import subprocess
import sys

CODE = """
import os, signal
from evomerge.cluster.ray_session import RaySession

told = []

def ours(number, frame):
    told.append(number)

signal.signal(signal.SIGTERM, ours)
original, given = signal.signal, []
signal.signal = lambda number, handler: (given.append((number, handler)), original(number, handler))[1]
with RaySession(None, 1):
    print("others' handlers:", [handler for number, handler in given if number == signal.SIGTERM and handler is not ours])
    os.kill(os.getpid(), signal.SIGTERM)
    print("told while it runs:", len(told))
os.kill(os.getpid(), signal.SIGTERM)
print("told afterwards:", len(told))
"""


def test_ray_takes_no_signal_away() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.splitlines() == ["others' handlers: []", "told while it runs: 1", "told afterwards: 2"], (
        done.returncode,
        done.stderr,
    )
