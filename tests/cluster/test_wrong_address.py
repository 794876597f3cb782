"""An address where no cluster answers gives one message, quickly; Ray by itself retries for a quarter of an hour, prints a line every second, or ends the process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RAY = """
import os, sys

def init(address, **options):
    def say(text):
        os.write(2, f"[2026-01-01 00:00:00,001 W 7 7] gcs_client.cc:210: {text}\\n".encode())

    manner = os.environ["MANNER"]
    for _ in range(20 if manner == "refuses" else 0):
        say("InvalidAuthToken: token is missing or incorrect")
    if manner == "refuses":
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}")
    if manner == "waits in vain":
        raise ConnectionError("ray client connection timeout")
    if manner == "differs":
        raise RuntimeError("Version mismatch: the cluster was started with:\\n    Python: 3.12\\nThis process with:\\n    Python: 3.11")
    if manner == "aborts":
        say("Failed to connect to socket at address:/tmp/ray/session_1/sockets/raylet")
        os.write(2, b"*** StackTrace Information ***\\n_raylet.so(+0x1)\\n")
        os._exit(1)
    if manner == "says much":
        for letter in "abcde":
            say(letter)
        raise ConnectionError("no")
    if manner == "ends":
        os._exit(3)
    if manner == "takes no token" and "RAY_AUTH_TOKEN" in os.environ:
        raise ConnectionError("nobody has given a token")
    if manner == "hangs":
        import time
        time.sleep(100)

def shutdown():
    pass
"""

CODE = """
import sys, threading
from evomerge.cluster import ray_session
from evomerge.core import EngineError

ray_session.ANSWER_S = float(sys.argv[2])

def connect():
    try:
        with ray_session.RaySession(sys.argv[1]):
            print("connected")
    except EngineError as error:
        print(error)

if "in a thread" in sys.argv:
    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
else:
    connect()
"""


def said(folder: Path, address: str, manner: str, *more: str, patience_s: float = 60, **environment: str) -> str:
    """The output of a process that connects to `address` with a Ray that behaves in this manner."""
    (folder / "ray" / "_private").mkdir(parents=True, exist_ok=True)
    (folder / "ray" / "__init__.py").write_text(RAY)
    (folder / "ray" / "_private" / "services.py").write_text(
        "def canonicalize_bootstrap_address(address):\n    return '127.0.0.1:1' if address == 'auto' else address\n"
    )
    (folder / "ray" / "_private" / "utils.py").write_text("set_sigterm_handler = None\n")
    (folder / "elsewhere").mkdir(exist_ok=True)
    (folder / "elsewhere" / "ray.py").write_text("raise ValueError('this is not Ray')")
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE, address, str(patience_s), *more],
        env={**inherited, "PYTHONPATH": path, "MANNER": manner, "RAY_AUTH_MODE": "token", **environment},
        cwd=folder / "elsewhere", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_reason_is_reported_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = f"127.0.0.1:{listening.getsockname()[1]}"
        assert said(tmp_path, place, "connects") == "connected"
        assert said(tmp_path, f"ray://{place}", "connects") == "connected"
        refused = f"cannot connect to a Ray cluster at {place}: Failed to connect to Ray cluster at {place}; InvalidAuthToken: token is missing or incorrect"
        assert said(tmp_path, place, "refuses") == refused
        assert said(tmp_path, place, "refuses", RAY_AUTH_MODE="disabled").startswith(
            f"{refused}. If the cluster requires a token"
        )
        assert said(tmp_path, place, "aborts") == (
            f"cannot connect to a Ray cluster at {place}: Failed to connect to socket at address:/tmp/ray/session_1/sockets/raylet. This machine is not a node of the cluster: "
            "add it with `ray start`, or use ray://HEAD:10001"
        )
        assert said(tmp_path, place, "differs") == (
            f"cannot connect to a Ray cluster at {place}: Version mismatch: the cluster was started with: Python: 3.12 This process with: Python: 3.11"
        )
        assert said(tmp_path, f"ray://{place}", "waits in vain") == (
            f"cannot connect to a Ray cluster at ray://{place}: ray client connection timeout. A wrong token may be the cause"
        )
        assert said(tmp_path, place, "says much") == f"cannot connect to a Ray cluster at {place}: no; c; d; e"
        ended = f"cannot connect to a Ray cluster at {place}: the connecting process exited with code 3"
        assert said(tmp_path, place, "ends") == ended
        assert said(tmp_path, place, "ends", RAY_AUTH_MODE="disabled").startswith(
            f"{ended}. If the cluster requires a token"
        )
        assert said(tmp_path, "ray://nobody", "differs").startswith(
            "cannot connect to a Ray cluster at ray://nobody: Version mismatch"
        )
        assert "has not answered within 2 s" in said(tmp_path, place, "hangs", patience_s=2)


@pytest.mark.parametrize(
    ("address", "place"), [("127.0.0.1:1", ""), ("ray://127.0.0.1:1", ""), ("auto", "127.0.0.1:1, ")]
)
def test_ray_is_not_asked_if_nothing_listens(tmp_path: Path, address: str, place: str) -> None:
    assert said(tmp_path, address, "hangs") == (
        f"cannot connect to a Ray cluster at {address}: {place}nothing answers there ([Errno 111] Connection refused)"
    )


def test_a_cluster_is_joined_with_the_users_token_or_none(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = f"127.0.0.1:{listening.getsockname()[1]}"
        assert said(tmp_path, place, "takes no token") == "connected"


def test_a_thread_can_join_a_cluster(tmp_path: Path) -> None:
    """Only the main thread may set signal handlers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert said(tmp_path, f"127.0.0.1:{listening.getsockname()[1]}", "connects", "in a thread") == "connected"


def test_an_ipv6_address_is_accepted(tmp_path: Path) -> None:
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as reason:
        pytest.skip(f"this machine has no IPv6: {reason}")
    with listening:
        assert said(tmp_path, f"ray://[::1]:{listening.getsockname()[1]}", "connects") == "connected"
