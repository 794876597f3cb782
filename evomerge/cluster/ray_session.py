"""Connections to Ray. A local cluster is protected from others: it listens only on the loopback interface, and every connection needs a token
that is generated for it. Import this before anything that imports Ray.
"""

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from evomerge.cluster.session_folder import SessionFolder
from evomerge.core import EngineError

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 << 20
"""Results are a few kilobytes; Ray's default is 30% of the machine's memory."""

CONNECT_S = 10.0
"""how long a cluster's address may take to accept a connection; Ray itself would retry for 15 minutes"""

ANSWER_S = 120.0
"""how long connecting to Ray may then take; with a wrong token Ray gives up after 20 s"""

_JOIN = """
import logging, sys, ray
try:
    ray.init(sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
except Exception as problem:
    print(problem)
    sys.exit(1)
"""

_MAX_REASONS = 3
"""maximum number of different lines of Ray's log shown if it does not connect"""

_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""An environment variable that Ray reads on import. "0" makes it use 127.0.0.1 as its own address on every system and bind to it; if passed as an
argument, Ray would replace a loopback address by the machine's public one."""


class RaySession:
    """A connection to a Ray cluster, or a local one that ends with it.

    Args:
        address: a running cluster; None = start a local one.
        n_cpus: number of CPUs of a local one; None = all.

    Raises:
        EngineError: cannot connect to a cluster at `address`, or start a local one.
    """

    def __init__(self, address: str | None, n_cpus: int | None = None) -> None:
        self._address, self._n_cpus = address, n_cpus
        self._folder: SessionFolder | None = None

    def __enter__(self) -> "RaySession":
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self._address is None:
            keep_to_this_machine()
        import ray

        common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            with _handler_kept():
                if self._address is None:
                    self._folder = SessionFolder()
                    ray.init(
                        address="local",
                        num_cpus=self._n_cpus,
                        include_dashboard=False,
                        object_store_memory=OBJECT_STORE_BYTES,
                        **common,
                    )
                    self._folder.adopt(Path(ray._private.worker._global_node.get_session_dir_path()))
                else:
                    _try_to_join(self._address)
                    ray.init(address=self._address, **common)
        except Exception as problem:  # the pool boundary: Ray raises a bare Exception if a node is slow to start
            ray.shutdown()
            self._close_folder(keep_session=True)
            what = f"connect to a Ray cluster at {self._address}" if self._address else "start Ray on this machine"
            raise EngineError(f"cannot {what}: {problem}") from problem
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        with _handler_kept():
            ray.shutdown()
        self._close_folder(keep_session=isinstance(error, EngineError))

    def _close_folder(self, *, keep_session: bool) -> None:
        if self._folder is not None:
            self._folder.close(keep_session=keep_session)
            self._folder = None

    @property
    def folder(self) -> Path | None:
        """A temporary folder that is deleted with the session; None if the cluster was not started by it."""
        return None if self._folder is None else self._folder.path

    def resources(self) -> Mapping[str, float]:
        """Total resources, e.g. {"CPU": 8, "GPU": 2}."""
        import ray

        return {name: float(amount) for name, amount in ray.cluster_resources().items()}

    def nodes(self) -> Mapping[str, Mapping[str, float]]:
        """Address and start of the id -> resources, for every node that is alive."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        return {f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})": dict(node["Resources"]) for node in alive}

    def room(self, cpus: float, gpus: float) -> int:
        """The number of workers of this size that fit, each on a single node."""
        return room_for(cpus, gpus)


def _try_to_join(address: str) -> None:
    """Raise ConnectionError with the reason if it is not possible to connect to the cluster.

    Tries it in a separate process, since Ray prints the reason repeatedly, ignores Ctrl-C, or ends the process if it cannot connect.
    """
    _check_port(address)
    command = [sys.executable, "-P", "-c", _JOIN, address]
    try:
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"something listens there but has not answered within {ANSWER_S:g} s") from None
    if done.returncode:
        raise ConnectionError(_why(done))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """The reason (what Ray raised, and the distinct lines that its C++ part logged), and what to do."""
    found = (re.match(r"\[[^]]*\] \S+:\d+: (.*)", line) for line in done.stderr.splitlines())
    logged = [*dict.fromkeys(match[1] for match in found if match)][-_MAX_REASONS:]
    said = [part for part in (" ".join(done.stdout.split()), *logged) if part]
    reason = "; ".join(said) or f"the connecting process exited with code {done.returncode}"
    if "sockets/raylet" in reason:
        return f"{reason}. This machine is not a node of the cluster: add it with `ray start`, or use ray://HEAD:10001"
    if "ray client connection timeout" in reason:
        return f"{reason}. A wrong token may be the cause"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"{reason}. If the cluster requires a token, set RAY_AUTH_MODE=token and put the token into ~/.ray/auth_token"
    return reason


def _check_port(address: str) -> None:
    """Raise ConnectionError if nothing listens at the address (for `auto`: the one that Ray finds), or if Ray would start a new cluster."""
    from ray._private.services import canonicalize_bootstrap_address

    meant = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address  # as Ray does
    place = meant.removeprefix("ray://") if meant.startswith("ray://") else canonicalize_bootstrap_address(meant)
    if place is None:
        raise ConnectionError(
            "no cluster is running, and Ray would start one that is open to others; leave the address out to let evomerge start a protected one"
        )
    host, _, port = place.rpartition(":")
    if not (host and port.isdigit()):
        return  # Ray reports an invalid address itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        found = "" if place in address else f"{place}, "
        raise ConnectionError(f"{found}nothing answers there ({error})") from error


@contextmanager
def _handler_kept() -> Iterator[None]:
    """Keep this process's SIGTERM handler while Ray starts or ends; Ray does not change those of other signals.

    `ray.init` sets a handler that exits with code 15 at any point; `ray.shutdown` restores the system's default action, which ends the process
    without running any Python code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    before = signal.getsignal(signal.SIGTERM)
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler
        signal.signal(signal.SIGTERM, before)


def room_for(cpus: float, gpus: float) -> int:
    """The number of workers of this size that the nodes which are alive can hold, regardless of what is running on them now."""
    import ray

    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            fits = [resources.get(name, 0.0) / need for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
            total += int(min(fits) + 1e-9)
    return total


def keep_to_this_machine() -> None:
    """Set the environment variables that protect a local cluster and are inherited by all its processes; keeps those set by the user.

    Ray reads them when it is imported. If set later, they would affect the cluster's processes but not this one, which could then not
    connect; so if Ray has already been imported, this only logs a warning.
    """
    if "ray" in sys.modules and (os.environ.get(_LOOPBACK_ONLY) != "0" or "RAY_AUTH_MODE" not in os.environ):
        logger.warning(
            "Ray was imported before the session, so the local cluster may listen on all interfaces and does not require a token; "
            "start the search before importing Ray, or set %s=0 and RAY_AUTH_MODE=token",
            _LOOPBACK_ONLY,
        )
        return
    os.environ.setdefault(_LOOPBACK_ONLY, "0")
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
