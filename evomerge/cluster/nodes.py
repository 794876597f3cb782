"""A Ray cluster of several nodes on this machine, to try out what happens when nodes come and go."""

import logging
import socket
from typing import Any

from evomerge.cluster.ray_session import keep_to_this_machine
from evomerge.core import EngineError

__all__ = ["add_node", "start_cluster"]

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20
"""Of each node; about the least that Ray takes."""

_ATTEMPTS = 10
_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")


def start_cluster(**resources: float) -> Any:
    """A `ray.cluster_utils.Cluster` that has a head node; `address` is where a `RaySession` finds it.

    Args:
        resources: of the head: `num_cpus` (default 1), `num_gpus`; they are only counted, so there may be more than exist.

    Raises:
        EngineError: no node can be started.
    """
    keep_to_this_machine()
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    add_node(cluster, include_dashboard=False, **resources)
    return cluster


def add_node(cluster: Any, **options: Any) -> Any:
    """A further node, to be given to `cluster.remove_node`. On a busy machine its parts may miss each other's time limits: tried again.

    Raises:
        EngineError: no node can be started.
    """
    for attempt in range(_ATTEMPTS):
        # with ports that are given the node does not wait for its agents, which are slow on a busy machine
        ports = {name: _free_port() for name in _AGENT_PORTS}
        before = cluster.list_all_nodes()
        try:
            return cluster.add_node(**{"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES} | ports | options)
        except Exception as problem:  # noqa: BLE001  (Ray raises nothing more special)
            logger.warning("a Ray node did not start (attempt %d): %s", attempt, problem)
            # one that was only too late is part of the cluster, and would count beside the one that takes its place
            for node in cluster.list_all_nodes():
                if node not in before:
                    cluster.remove_node(node, allow_graceful=False)
    raise EngineError(f"no Ray node could be started in {_ATTEMPTS} attempts")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
