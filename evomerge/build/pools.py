"""config -> the worker pool of a run."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Protocol

from evomerge.build.engines import gpus_per_worker, worker_environment
from evomerge.build.evaluators import FACTORY, evaluator_settings
from evomerge.build.problem import Problem
from evomerge.build.versions import package_versions
from evomerge.cluster import LocalPool
from evomerge.config import SearchConfig, SyntheticConfig
from evomerge.core import ConfigError, Json
from evomerge.search import RunDirectory, WorkerPool

logger = logging.getLogger(__name__)


class RunPool(WorkerPool, Protocol):
    """A pool of a known size that can be shut down."""

    @property
    def n_workers(self) -> int:
        """The number of workers, including those that start as soon as there is room."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def worker_pool(problem: Problem, directory: RunDirectory) -> AbstractContextManager[RunPool]:
    """The worker pool of a configuration, as a context manager that closes it.

    Raises:
        ConfigError: this machine has no room for the configured number of workers.
        EngineError: the Ray cluster does not answer.
    """
    config = problem.config

    def settings(config: SearchConfig) -> dict[str, Json]:
        return evaluator_settings(config, n_slots=problem.max_slots, marks=problem.marks)

    if config.cluster.kind == "local":
        return _local_pool(config, settings(config))
    return _ray_pool(config, settings, directory)


@contextmanager
def _local_pool(config: SearchConfig, settings: Mapping[str, Json]) -> Iterator[RunPool]:
    n_workers = 1 if config.cluster.workers == "auto" else config.cluster.workers
    with closing(LocalPool(FACTORY, settings, n_workers)) as pool:
        yield pool


@contextmanager
def _ray_pool(
    config: SearchConfig, settings: Callable[[SearchConfig], Mapping[str, Json]], directory: RunDirectory
) -> Iterator[RunPool]:
    from evomerge.cluster.ray_session import RaySession

    cluster = config.cluster
    wanted = None if cluster.workers == "auto" else cluster.workers
    cpus = cluster.cpus_per_worker or 1.0
    n_cpus = None if wanted is None else max(os.cpu_count() or 1, round(wanted * cpus))
    with RaySession(cluster.address, n_cpus) as session:
        resources = session.resources()
        has_gpu = resources.get("GPU", 0) > 0 and not isinstance(config.evaluation, SyntheticConfig)
        gpus = gpus_per_worker(config) if has_gpu else 0.0
        if cluster.cpus_per_worker is None:
            here = float(len(os.sched_getaffinity(0))) if cluster.address is None else math.inf
            cores = cores_beside(gpus, session.nodes().values(), most=here)
            config = config.model_copy(update={"cluster": cluster.model_copy(update={"cpus_per_worker": cores})})
        room = session.room(cpus, gpus)
        n_workers = wanted or max(1, room)
        if n_workers > room and cluster.address is None:
            raise ConfigError(f"cluster.workers: {n_workers} workers do not fit: {dict(resources)} has room for {room}")
        if n_workers > room:
            logger.warning(
                "the cluster has room for %d of %d workers (each %g CPUs, %g GPUs); the others start when there is more",
                *(room, n_workers, cpus, gpus),
            )
        from evomerge.cluster.ray_pool import RayPool, WorkerOptions

        environment = worker_environment(config)
        if environment and session.folder is not None:
            environment |= _temporary_files(session.folder)
        options = WorkerOptions(
            n_workers=wanted,
            cpus=cpus,
            gpus=gpus,
            environment=environment,
            max_attempts=cluster.max_attempts,
            evaluation_timeout_s=cluster.evaluation_timeout_s,
            startup_timeout_s=cluster.startup_timeout_s,
            log_folder=str(directory.logs.resolve()) if cluster.address is None else None,
            versions={name: found for name, found in package_versions().items() if name != "python"},
        )
        pool = RayPool(FACTORY, settings(config), options)
        try:
            yield pool
        finally:
            # A local Ray, started by this session, ends its workers itself; if a signal to all processes has ended it already, it would never answer.
            if session.folder is None:
                pool.close()


def _temporary_files(folder: Path) -> dict[str, str]:
    """Environment variables that put a worker's temporary files into `folder`, so that they are deleted with it however the worker ends.

    Code compiled by torch stays outside, so that later workers can reuse it.
    """
    compiled = Path(gettempdir()) / f"torchinductor_{os.getuid()}"
    return {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))}


def cores_beside(gpus: float, nodes: Iterable[Mapping[str, float]], most: float = math.inf) -> float:
    """CPU cores for a worker with `gpus` GPUs, such that workers can use all GPUs of every node; 1 without GPUs.

    Args:
        gpus: GPUs per worker.
        nodes: the resources of each node.
        most: maximum number of cores of a node that this process may use.
    """
    shares = [
        gpus * min(most, node.get("CPU", 0.0)) / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= gpus > 0
    ]
    return float(max(1, int(min(shares, default=1.0) + 1e-9)))
