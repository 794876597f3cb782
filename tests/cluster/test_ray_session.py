"""What is counted and what is closed, without a cluster: Ray's answers are given."""

from typing import Any

import pytest

from evomerge.cluster.nodes import add_node
from evomerge.cluster.ray_session import RaySession, keep_to_this_machine, room_for
from evomerge.core import EngineError


def _node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name * 8, "NodeManagerAddress": f"10.0.0.{name}", "Alive": alive, "Resources": resources}


def test_room_is_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to_this_machine()  # Ray reads its settings on import, and later tests of this process start a cluster
    import ray

    nodes = [
        _node("1", CPU=7.0, GPU=2.0),
        _node("2", CPU=64.0, GPU=1.0, memory=1e9),
        _node("3", CPU=64.0, GPU=8.0, alive=False),
        _node("4", CPU=3.0),
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert room_for(4, 1) == 2, "one on each of the first two"
    assert room_for(1, 0) == 74
    assert room_for(0, 1) == 3
    assert room_for(0.28, 0) == 25 + 228 + 10, "7 / 0.28 is 24.999999999999996"
    assert RaySession(None).room(0.1, 0.3) == 6 + 3
    assert RaySession(None).nodes() == {
        "10.0.0.1 (111111)": {"CPU": 7.0, "GPU": 2.0},
        "10.0.0.2 (222222)": {"CPU": 64.0, "GPU": 1.0, "memory": 1e9},
        "10.0.0.4 (444444)": {"CPU": 3.0},
    }


class SlowNodes:
    """A cluster whose nodes do not start the first times."""

    def __init__(self, n_failures: int) -> None:
        self.n_failures, self.tried = n_failures, list[dict[str, Any]]()

    def add_node(self, **options: Any) -> str:
        self.tried.append(options)
        if len(self.tried) <= self.n_failures:
            raise Exception("the node's agent did not answer")
        return "a node"


def test_a_node_that_does_not_start_is_tried_again_with_other_ports() -> None:
    cluster = SlowNodes(2)
    assert add_node(cluster, num_gpus=3, num_cpus=2) == "a node"
    assert [(options["num_cpus"], options["num_gpus"]) for options in cluster.tried] == [(2, 3)] * 3
    assert len({options["metrics_agent_port"] for options in cluster.tried}) == 3
    with pytest.raises(EngineError, match="no Ray node could be started in 10 attempts"):
        add_node(SlowNodes(10))
