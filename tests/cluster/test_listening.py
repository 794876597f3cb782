"""A local cluster is reachable only from this machine and by this user."""

import os
import subprocess
import sys

import psutil

from evomerge.cluster.ray_session import RaySession


def test_nothing_listens_beyond_this_machine_and_a_token_is_required() -> None:
    with RaySession(None, n_cpus=1):
        _check()


def _check() -> None:
    import ray

    me = psutil.Process()
    n_listening = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue  # it has ended since it was listed, so it does not listen
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                n_listening += 1
                assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (process.pid, connection)
    assert n_listening >= 2, "the head and the raylet should listen; perhaps no process was examined"
    address = ray.get_runtime_context().gcs_address
    code = (
        f"import ray; ray.init(address={address!r}, logging_level=50, log_to_driver=False)\n"
        "print('in', ray.cluster_resources()['CPU'], flush=True)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    wrong = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    stranger = subprocess.Popen(
        [sys.executable, "-c", code], env=wrong, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    friend = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert friend.stdout.startswith("in"), friend.stderr
    stranger.kill()  # it has had as much time as the friend needed; Ray would keep trying for minutes
    assert b"in" not in stranger.communicate()[0]
