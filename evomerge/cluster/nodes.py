"""A Ray cluster of several nodes on this machine, to test what happens when nodes join and leave."""

import logging
import socket
from typing import Any

from evomerge.cluster.ray_session import keep_to_this_machine
from evomerge.core import EngineError

__all__ = ["add_node", "start_cluster"]

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20
"""per node; about the minimum that Ray accepts"""

_ATTEMPTS = 10
_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")


def start_cluster(**resources: float) -> Any:
    """Start a `ray.cluster_utils.Cluster` with a head node; connect a `RaySession` to its `address`.

    Args:
        resources: resources of the head node: `num_cpus` (default 1), `num_gpus`; only counted, so they may exceed what exists.

    Raises:
        EngineError: no node can be started.
    """
    keep_to_this_machine()
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    add_node(cluster, include_dashboard=False, **resources)
    return cluster


def add_node(cluster: Any, **options: Any) -> Any:
    """Add a node to the cluster and return it, for `cluster.remove_node`. Retries, since nodes may time out on a busy machine.

    Raises:
        EngineError: no node can be started.
    """
    for attempt in range(_ATTEMPTS):
        # with given ports the node does not wait for its agents, which are slow on a busy machine
        ports = {name: _free_port() for name in _AGENT_PORTS}
        before = cluster.list_all_nodes()
        try:
            return cluster.add_node(**{"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES} | ports | options)
        except Exception as problem:  # noqa: BLE001  (Ray raises nothing more specific)
            logger.warning("a Ray node did not start (attempt %d): %s", attempt, problem)
            # a node that was only late is part of the cluster, and would remain in addition to its replacement
            for node in cluster.list_all_nodes():
                if node not in before:
                    cluster.remove_node(node, allow_graceful=False)
    raise EngineError(f"no Ray node could be started in {_ATTEMPTS} attempts")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
