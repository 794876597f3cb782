"""What is reported about the number of workers that a cluster has room for."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.build import make_problem, parse_config
from evomerge.build.engines import cpus_per_worker, worker_environment
from evomerge.build.pools import cores_beside, worker_pool
from evomerge.core import ConfigError
from evomerge.search import RunDirectory


class FourProcessors:
    """A Ray session on a cluster with four CPUs."""

    folder = None

    def __init__(self, address: str | None, n_cpus: int | None = None) -> None:
        pass

    def __enter__(self) -> "FourProcessors":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def nodes(self) -> dict[str, dict[str, float]]:
        return {"one": self.resources()}

    def room(self, cpus: float, gpus: float) -> int:
        return int(4 // cpus)


class NoPool:
    """A pool that is never asked for anything, with as many workers as requested, or as many as there is room for."""

    def __init__(self, factory: str, settings: object, options: Any) -> None:
        self.n_workers = options.n_workers or max(1, int(4 // options.cpus))

    def close(self) -> None:
        pass


def started(folder: Path, **cluster: Any) -> int:
    config = parse_config(
        {"evaluation": {"kind": "synthetic"}, "cluster": cluster, "budget": {"evaluations": 5}}, folder=folder
    )
    with worker_pool(make_problem(config), RunDirectory(folder)) as pool:
        return pool.n_workers


def test_workers_that_do_not_fit_yet_are_reported_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("evomerge.cluster.ray_session.RaySession", FourProcessors)
    monkeypatch.setattr("evomerge.cluster.ray_pool.RayPool", NoPool)
    assert started(tmp_path, address="auto") == 4
    assert started(tmp_path, address="auto", workers=4) == 4
    assert not caplog.text
    assert started(tmp_path, address="auto", workers=9) == 9
    assert "room for 4 of 9 workers (each 1 CPUs, 0 GPUs); the others start when there is more" in caplog.text
    caplog.clear()
    assert started(tmp_path, address="auto", cpus_per_worker=8) == 1
    assert "room for 0 of 1 workers (each 8 CPUs" in caplog.text
    with pytest.raises(ConfigError, match=r"9 workers do not fit: .* has room for 4"):
        started(tmp_path, workers=9)


@pytest.mark.parametrize(
    ("gpus", "nodes", "cores"),
    [
        (0.0, [{"CPU": 64.0, "GPU": 8.0}], 1),
        (1.0, [{"CPU": 64.0, "GPU": 8.0}], 8),
        (4.0, [{"CPU": 64.0, "GPU": 8.0}], 32),
        (0.5, [{"CPU": 64.0, "GPU": 8.0}], 4),
        (1.0, [{"CPU": 208.0, "GPU": 8.0}, {"CPU": 30.0, "GPU": 2.0}, {"CPU": 4.0}], 15),
        (4.0, [{"CPU": 208.0, "GPU": 8.0}, {"CPU": 30.0, "GPU": 2.0}], 104),
        (1.0, [{"CPU": 2.0, "GPU": 4.0}], 1),
        (1.0, [], 1),
    ],
)
def test_a_workers_cores_follow_its_share_of_gpus(gpus: float, nodes: list[dict[str, float]], cores: int) -> None:
    assert cores_beside(gpus, nodes) == cores


def test_cores_this_process_may_not_use_do_not_count() -> None:
    assert cores_beside(1.0, [{"CPU": 64.0, "GPU": 2.0}], most=8.0) == 4


def test_a_worker_is_told_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Eight(FourProcessors):
        def resources(self) -> dict[str, float]:
            return {"CPU": 32.0, "GPU": 4.0}

    class Told(NoPool):
        def __init__(self, factory: str, settings: Any, options: Any) -> None:
            super().__init__(factory, settings, options)
            told.append((settings["config"]["cluster"]["cpus_per_worker"], options.cpus, options.gpus))

    monkeypatch.setattr("evomerge.cluster.ray_session.RaySession", Eight)
    monkeypatch.setattr("evomerge.cluster.ray_pool.RayPool", Told)
    started(tmp_path, address="auto")  # a synthetic evaluation takes no GPU
    started(tmp_path, address="auto", cpus_per_worker=3)
    monkeypatch.setattr("evomerge.build.pools.SyntheticConfig", str)
    started(tmp_path, address="auto", gpus_per_worker=2)
    assert told == [(1.0, 1.0, 0.0), (3.0, 3.0, 0.0), (16.0, 1.0, 2.0)]


def test_the_processes_of_an_engine_share_a_workers_cores(tmp_path: Path) -> None:
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": ["gsm8k"],
        "engine": {"kind": "vllm", "tensor_parallel": 4},
        "cluster": {"cpus_per_worker": 34},
        "budget": {"evaluations": 9},
    }
    config = parse_config(settings, folder=tmp_path)
    assert cpus_per_worker(config) == 34
    assert worker_environment(config)["OMP_NUM_THREADS"] == "8"
