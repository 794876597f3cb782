"""An address where no cluster answers is one message, soon; Ray alone tries for a quarter of an hour and prints a line each second."""

import subprocess
import sys

import pytest

CODE = """
import os, socket, sys
from evomerge.cluster.ray_session import RaySession
from evomerge.core import EngineError

import ray

def refused(address, **options):
    for second in range(20):
        os.write(2, f"[2026-01-01 00:00:{second:02d} W 7 7] gcs_client.cc:210: InvalidAuthToken: token is missing or incorrect\\n".encode())
    raise ConnectionError(f"Failed to connect to Ray cluster at {address}")

def joined(address, **options):
    os.write(2, b"a warning\\n")

listening = socket.create_server(("", 0))  # Ray replaces a loopback address by the machine's own
port = listening.getsockname()[1]
for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
    ray.init = joined
    RaySession(address).__enter__()
    ray.init = refused
    try:
        RaySession(address).__enter__()
    except EngineError as error:
        print(error)
listening.close()
try:
    RaySession(sys.argv[1].format(port=port)).__enter__()
except EngineError as error:
    print(error)
print(port)
"""


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "auto"])
def test_the_reason_is_said_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if address == "auto":
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", CODE, address], capture_output=True, text=True, timeout=60, check=True)
    *refused, nobody, port = done.stdout.splitlines()
    assert refused == [
        f"no Ray cluster at {place}: Failed to connect to Ray cluster at {place}; InvalidAuthToken: token is missing or incorrect"
        for place in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}")
    ]
    assert nobody.startswith(f"no Ray cluster at {address.format(port=port)}: ")
    assert "nothing answers there ([Errno 111] Connection refused)" in nobody
    assert address != "auto" or ":1, nothing" in nobody, "where `auto` looked is said"
    assert done.stderr == "a warning\n" * 2, "what Ray says where it connects is passed on"
