"""A connection to Ray, started in a way that lets nobody else in: a local cluster listens on the loopback interface only, and every
connection to it needs a token that is made for it. Import this before anything that imports Ray.
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
"""Results are a few kilobytes; Ray's default takes 30% of the machine."""

CONNECT_S = 10.0
"""How long a cluster's address may take to answer; Ray itself would go on trying for a quarter of an hour."""

ANSWER_S = 120.0
"""How long it may then take to connect; Ray gives up a wrong token after 20 s."""

_JOIN = """
import logging, sys, ray
try:
    ray.init(sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
except Exception as problem:
    print(problem)
    sys.exit(1)
"""

_MAX_REASONS = 3
"""So many different lines of what Ray printed are shown where it does not connect."""

_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray reads it on import. "0" makes Ray take 127.0.0.1 for its own address on every system and bind to it; a loopback address that is
asked for by argument is replaced by the machine's public one."""


class RaySession:
    """A connection to a Ray cluster, or a local one that ends with it.

    Args:
        address: a running cluster; None = start a local one.
        n_cpus: how many CPUs a local one offers; None = all.

    Raises:
        EngineError: no cluster answers at `address`.
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
        except Exception as problem:  # the pool boundary: a node that is slow to start is a bare Exception of Ray's
            ray.shutdown()
            self._close_folder(keep_session=True)
            raise EngineError(f"no Ray cluster at {self._address or 'this machine'}: {problem}") from problem
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
        """A temporary folder that goes with the session; None where the cluster is not ours."""
        return None if self._folder is None else self._folder.path

    def resources(self) -> Mapping[str, float]:
        """Total resources, e.g. {"CPU": 8, "GPU": 2}."""
        import ray

        return {name: float(amount) for name, amount in ray.cluster_resources().items()}

    def nodes(self) -> Mapping[str, Mapping[str, float]]:
        """Resources of every node that is alive, by its address and the start of its id."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        return {f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})": dict(node["Resources"]) for node in alive}

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers of this size fit; each on one node, nodes may differ."""
        return room_for(cpus, gpus)


def _try_to_join(address: str) -> None:
    """Raises ConnectionError with the reason where a process cannot connect to the cluster.

    Tried in a process of its own: where Ray does not connect it prints the reason again and again, ignores Ctrl-C, or ends the process.
    """
    _knock(address)
    command = [sys.executable, "-P", "-c", _JOIN, address]
    try:
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"something listens there, but has not answered in {ANSWER_S:g} s") from None
    if done.returncode:
        raise ConnectionError(_why(done))


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """The reason: what Ray raised, and what its C++ part logged, each once; and what to do."""
    found = (re.match(r"\[[^]]*\] \S+:\d+: (.*)", line) for line in done.stderr.splitlines())
    logged = [*dict.fromkeys(match[1] for match in found if match)][-_MAX_REASONS:]
    said = [part for part in (" ".join(done.stdout.split()), *logged) if part]
    reason = "; ".join(said) or f"a process that connected ended with {done.returncode}"
    if "sockets/raylet" in reason:
        return f"{reason}. This machine is no node of it: `ray start` it as one, or give ray://HEAD:10001"
    if "ray client connection timeout" in reason:
        return f"{reason}. A wrong token ends so too"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"{reason}. If it asks for a token, set RAY_AUTH_MODE=token and have its token in ~/.ray/auth_token"
    return reason


def _knock(address: str) -> None:
    """Raises ConnectionError where nothing listens at the address, also where it is found by `auto`, or where Ray would start a cluster."""
    from ray._private.services import canonicalize_bootstrap_address

    meant = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address  # so does Ray
    place = meant.removeprefix("ray://") if meant.startswith("ray://") else canonicalize_bootstrap_address(meant)
    if place is None:
        raise ConnectionError("Ray would start one, open to others; without an address evomerge starts one that is not")
    host, _, port = place.rpartition(":")
    if not (host and port.isdigit()):
        return  # Ray says what it does not understand
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        found = "" if place in address else f"{place}, "
        raise ConnectionError(f"{found}nothing answers there ({error})") from error


@contextmanager
def _handler_kept() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM while Ray starts or ends; those of other signals Ray leaves alone.

    `ray.init` sets one that exits with 15 in the middle of whatever is done; `ray.shutdown` gives SIGTERM back to the system, which ends the process,
    without telling Python.
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
    """How many workers of this size the nodes that are alive hold, whatever runs on them now."""
    import ray

    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            fits = [resources.get(name, 0.0) / need for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
            total += int(min(fits) + 1e-9)
    return total


def keep_to_this_machine() -> None:
    """Settings of a local cluster, inherited by every process of it. What the user has set stays.

    Ray reads them when it is imported. Set later they would reach the cluster's processes but not this one, which could then not
    connect; so a Ray that is imported already is left as it is, with a warning.
    """
    if "ray" in sys.modules and (os.environ.get(_LOOPBACK_ONLY) != "0" or "RAY_AUTH_MODE" not in os.environ):
        logger.warning(
            "Ray was imported before the session, so the local cluster may listen on all interfaces and asks for no token; "
            "start the search before importing Ray, or set %s=0 and RAY_AUTH_MODE=token",
            _LOOPBACK_ONLY,
        )
        return
    os.environ.setdefault(_LOOPBACK_ONLY, "0")
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
