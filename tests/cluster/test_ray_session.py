"""What is counted, set and refused, without a cluster: Ray's answers are faked."""

import re
import sys
from typing import Any

import pytest

from evomerge.cluster.nodes import OBJECT_STORE_BYTES, add_node
from evomerge.cluster.ray_session import RaySession, keep_to_this_machine, room_for
from evomerge.core import EngineError

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


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
    assert room_for(4, 1) == 2, "expected one on each of the first two nodes"
    assert room_for(1, 0) == 74
    assert room_for(0, 1) == 3
    assert room_for(0.28, 0) == 25 + 228 + 10, "7 / 0.28 gives 24.999999999999996 in floating point, but 25 fit"
    assert RaySession(None).room(0.1, 0.3) == 6 + 3
    assert RaySession(None).nodes() == {
        "10.0.0.1 (111111)": {"CPU": 7.0, "GPU": 2.0},
        "10.0.0.2 (222222)": {"CPU": 64.0, "GPU": 1.0, "memory": 1e9},
        "10.0.0.4 (444444)": {"CPU": 3.0},
    }


class SlowNodes:
    """A cluster whose nodes fail to start the first few times."""

    def __init__(self, n_failures: int) -> None:
        self.n_failures, self.tried = n_failures, list[dict[str, Any]]()
        self.nodes: list[str] = []

    def add_node(self, **options: Any) -> str:
        self.tried.append(options)
        self.nodes.append(f"node {len(self.tried)}")
        if len(self.tried) <= self.n_failures:
            raise Exception("the node's agent did not answer")
        return self.nodes[-1]

    def list_all_nodes(self) -> list[str]:
        return list(self.nodes)

    def remove_node(self, node: str, *, allow_graceful: bool) -> None:
        self.nodes.remove(node)


def test_a_node_that_fails_to_start_is_retried_with_other_ports(caplog: pytest.LogCaptureFixture) -> None:
    cluster = SlowNodes(2)
    cluster.nodes.append("the head")
    assert add_node(cluster, num_gpus=3, num_cpus=2) == "node 3"
    assert cluster.nodes == ["the head", "node 3"], "a node that started too late must not count as well"
    assert [message.partition(": ")[2] for message in caplog.messages] == ["the node's agent did not answer"] * 2
    assert [(options["num_cpus"], options["num_gpus"]) for options in cluster.tried] == [(2, 3)] * 3
    assert len({options["metrics_agent_port"] for options in cluster.tried}) == 3
    with pytest.raises(EngineError, match="no Ray node could be started in 10 attempts"):
        add_node(SlowNodes(10))
    cluster = SlowNodes(9)
    assert add_node(cluster) == "node 10"
    assert (cluster.tried[-1]["num_cpus"], cluster.tried[-1]["object_store_memory"]) == (1, OBJECT_STORE_BYTES)


def _settings(monkeypatch: pytest.MonkeyPatch, *, imported: bool = False, **given: str) -> dict[str, str]:
    """The environment variables a local cluster starts with, for a user who has set `given` and may have imported Ray already."""
    with monkeypatch.context() as patch:
        patch.setattr("os.environ", given)
        patch.delitem(sys.modules, "ray", raising=False)
        if imported:
            patch.setitem(sys.modules, "ray", sys)
        keep_to_this_machine()
    return given


def test_every_local_cluster_gets_its_own_token(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _settings(monkeypatch), _settings(monkeypatch)
    tokens = {first.pop("RAY_AUTH_TOKEN"), second.pop("RAY_AUTH_TOKEN")}
    assert [len(token) for token in tokens] == [64, 64]
    assert first == second == {LOOPBACK: "0", "RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize(
    "given",
    [
        {LOOPBACK: "1", "RAY_AUTH_MODE": "disabled"},
        {LOOPBACK: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"},
        {LOOPBACK: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "of-mine"},
    ],
)
def test_variables_set_by_the_user_are_kept(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    assert _settings(monkeypatch, **given) == given


@pytest.mark.parametrize("given", [{}, {LOOPBACK: "0"}, {"RAY_AUTH_MODE": "token"}])
def test_an_already_imported_ray_is_left_unchanged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: dict[str, str]
) -> None:
    """Settings that Ray has not read would reach the cluster's other processes, and Ray could then not connect to them."""
    assert _settings(monkeypatch, imported=True, **given) == given
    assert "may listen on all interfaces" in caplog.text


def test_a_ray_imported_with_these_settings_gives_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _settings(monkeypatch, imported=True, **_settings(monkeypatch))
    assert not caplog.text


def test_an_address_that_would_start_a_separate_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to_this_machine()
    for address, variable in (("local", ""), ("auto", "local")):
        monkeypatch.setenv("RAY_ADDRESS", variable)
        with pytest.raises(EngineError, match=f"cannot connect to a Ray cluster at {address}: no cluster is running"):
            RaySession(address).__enter__()


def test_auto_uses_the_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to_this_machine()
    import ray.util

    # 127.0.0.1, or this machine's own address if another test has already imported Ray
    this_machine = re.escape(ray.util.get_node_ip_address())
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            EngineError, match=rf"cannot connect to a Ray cluster at auto: {this_machine}:1, nothing answers there"
        ):
            RaySession("auto").__enter__()
