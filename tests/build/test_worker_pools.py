"""What is said of the workers that a cluster has room for."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.build import make_problem, parse_config
from evomerge.build.pools import worker_pool
from evomerge.core import ConfigError
from evomerge.search import RunDirectory


class FourProcessors:
    """A Ray session of a cluster with four CPUs."""

    folder = None

    def __init__(self, address: str | None, n_cpus: int | None = None) -> None:
        pass

    def __enter__(self) -> "FourProcessors":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def room(self, cpus: float, gpus: float) -> int:
        return int(4 // cpus)


class NoPool:
    """A pool that is never asked for anything, with as many workers as it is told, or all there is room for."""

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


def test_workers_that_do_not_fit_yet(
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
