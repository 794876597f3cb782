"""Workers as Ray actors, one engine each. Dead and hung workers are replaced and their candidates tried again, a limited number of times.

Requests and results are a few kilobytes; weights never pass through Ray's object store.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from evomerge.cluster.local_pool import failed
from evomerge.cluster.worker import make_evaluator
from evomerge.core import EngineError, Evaluation, EvaluationRequest, EvomergeError, Json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker gets and how patient the driver is with it.

    Attributes:
        n_workers: actors.
        cpus, gpus: Ray resources of each.
        environment: variables set before its Python starts.
        max_attempts: tries of a request whose worker dies or hangs.
        evaluation_timeout_s: a running evaluation older than this counts as hung.
        startup_timeout_s: how long a worker may take to be ready.
        log_folder: where each worker writes `worker-<n>.log`; None = nowhere.
    """

    n_workers: int
    cpus: float
    gpus: float
    environment: Mapping[str, str]
    max_attempts: int
    evaluation_timeout_s: float
    startup_timeout_s: float
    log_folder: str | None


class _Worker:
    """The actor: makes its evaluator first, then answers requests one at a time."""

    def __init__(self, log_file: str | None) -> None:
        if log_file is not None:
            _write_output_to(Path(log_file))

    def start(self, factory: str, settings: Mapping[str, Json]) -> EvomergeError | None:
        """Makes the evaluator; returns what the user has to mend, raises what may go away by itself."""
        try:
            self._evaluator = make_evaluator(factory, settings)
        except EvomergeError as problem:
            logger.exception("the evaluator cannot be made")
            return problem
        return None

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        return self._evaluator.evaluate(request)


@dataclass
class _Slot:
    """One worker's place: its actor, what it is doing, and since when."""

    index: int
    actor: Any
    task: Any
    request: EvaluationRequest | None
    since: float
    is_ready: bool = False
    n_failed_starts: int = 0


class RayPool:
    """A pool of Ray actors; `ray.init` must have been called (`ray_session`).

    Args:
        factory, settings: how a worker makes its evaluator (`make_evaluator`).
        options: see `WorkerOptions`.
    """

    def __init__(self, factory: str, settings: Mapping[str, Json], options: WorkerOptions) -> None:
        self._factory, self._settings, self._options = factory, settings, options
        self._actor_class: Any = ray.remote(_Worker)
        self._queue: deque[EvaluationRequest] = deque()
        self._done: deque[Evaluation] = deque()
        self._slots = [self._start(index) for index in range(options.n_workers)]

    @property
    def n_workers(self) -> int:
        """How many workers there are."""
        return len(self._slots)

    def submit(self, request: EvaluationRequest) -> None:
        """Queues a request; a free worker takes it."""
        self._queue.append(request)
        self._dispatch()

    def next_done(self, timeout_s: float) -> Evaluation | None:
        """The next finished evaluation, or None when none finishes in time.

        Raises:
            EvomergeError: what a worker said when its evaluator could not be made.
            EngineError: a worker died or hung while starting, `max_attempts` times.
        """
        if not self._done:
            self._collect(timeout_s)
        self._dispatch()
        return self._done.popleft() if self._done else None

    def close(self) -> None:
        """Kills the workers."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots.clear()

    def _start(self, index: int, n_failed_starts: int = 0) -> _Slot:
        options = self._options
        log_file = None if options.log_folder is None else str(Path(options.log_folder) / f"worker-{index}.log")
        actor = self._actor_class.options(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            max_restarts=0,
            runtime_env={"env_vars": dict(options.environment)},
        ).remote(log_file)
        started = actor.start.remote(self._factory, self._settings)
        return _Slot(index, actor, started, None, time.monotonic(), n_failed_starts=n_failed_starts)

    def _dispatch(self) -> None:
        for slot in self._slots:
            if self._queue and slot.is_ready and slot.task is None:
                slot.request = self._queue.popleft()
                slot.task = slot.actor.evaluate.remote(slot.request)
                slot.since = time.monotonic()

    def _collect(self, timeout_s: float) -> None:
        running = {slot.task: slot for slot in self._slots if slot.task is not None}
        if not running:
            time.sleep(timeout_s)
            return
        finished, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        if not finished:
            finished, _ = ray.wait(list(running), num_returns=1, timeout=timeout_s)
        for task in finished:
            self._take(running[task])
        for slot in list(self._slots):
            self._check_time(slot)

    def _take(self, slot: _Slot) -> None:
        """Takes the answer of a slot whose task has ended, well or not."""
        try:
            answer = ray.get(slot.task)
        except RayError as problem:
            self._replace(slot, _reason(problem))
            return
        slot.task = None
        if slot.request is None:
            if answer is not None:
                raise answer
            slot.is_ready = True
        else:
            slot.request = None
            self._done.append(answer)

    def _check_time(self, slot: _Slot) -> None:
        if slot.task is None:
            return
        limit = self._options.evaluation_timeout_s if slot.is_ready else self._options.startup_timeout_s
        age = time.monotonic() - slot.since
        if age > limit:
            what = "evaluation" if slot.is_ready else "start"
            self._replace(slot, f"the worker's {what} took more than {limit:g} s")

    def _replace(self, slot: _Slot, reason: str) -> None:
        """A new worker for a dead, hung or unstartable one; its request goes back to the head of the queue or fails."""
        logger.warning("worker %d is replaced: %s", slot.index, reason)
        ray.kill(slot.actor)
        request = slot.request
        if not slot.is_ready and slot.n_failed_starts + 1 >= self._options.max_attempts:
            raise EngineError(f"worker {slot.index} cannot start: {reason}")
        failed_starts = 0 if slot.is_ready else slot.n_failed_starts + 1
        self._slots[self._slots.index(slot)] = self._start(slot.index, failed_starts)
        if request is not None:
            if request.attempt + 1 < self._options.max_attempts:
                self._queue.appendleft(replace(request, attempt=request.attempt + 1))
            else:
                self._done.append(
                    failed(request, f"{request.attempt + 1} workers were lost with it; the last: {reason}")
                )


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

    def __enter__(self) -> "RaySession":
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if self._address is None:
                ray.init(
                    address="local",
                    num_cpus=self._n_cpus,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=256 << 20,  # results are small; the default takes 30% of the machine
                    **common,
                )
            else:
                ray.init(address=self._address, **common)
        except (ConnectionError, RuntimeError, ValueError) as problem:
            raise EngineError(f"no Ray cluster at {self._address or 'this machine'}: {problem}") from problem
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()

    def resources(self) -> Mapping[str, float]:
        """Total resources, e.g. {"CPU": 8, "GPU": 2}."""
        return {name: float(amount) for name, amount in ray.cluster_resources().items()}


def _reason(problem: RayError) -> str:
    """The line that says something, of Ray's long message: the last line of a remote traceback, else the first line."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    return lines[-1] if any(line.startswith("File ") for line in lines) else lines[0]


def _write_output_to(path: Path) -> None:
    """Sends everything this process prints or logs, C libraries included, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
