"""SIGTERM and SIGINT remain under this program's control while Ray starts and runs, and after it has ended; another program's Ray is left unchanged."""

import subprocess
import sys

CODE = """
import os, signal
from evomerge.cluster.ray_session import RaySession, keep_to_this_machine

keep_to_this_machine()
from ray._private import utils

told = []

def ours(number, frame):
    told.append(number)

signal.signal(signal.SIGTERM, ours)
signal.signal(signal.SIGINT, ours)
set_handler = utils.set_sigterm_handler
original, given = signal.signal, []
signal.signal = lambda number, handler: (given.append((number, handler)), original(number, handler))[1]
with RaySession(None, 1):
    print("others' handlers:", [handler for number, handler in given if number == signal.SIGTERM and handler is not ours])
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("told while it runs:", *told)
told.clear()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
print("told afterwards:", *told)
print("Ray's own:", utils.set_sigterm_handler is set_handler)
"""


def test_ray_does_not_take_over_signals() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.splitlines() == [
        "others' handlers: []",
        "told while it runs: 15 2",
        "told afterwards: 15 2",
        "Ray's own: True",
    ], (done.returncode, done.stderr)
