"""Workers as Ray actors with one engine each, each in its own placement group, so that all its GPUs are on one node.

Dead and hung workers are replaced and their candidates retried a limited number of times; workers lost with their nodes are not counted for
that. Workers are added when nodes join; if nodes are lost, their workers wait for new ones. Requests and results are a few kilobytes; weights never
pass through Ray's object store.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, NodeDiedError, RayError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from evomerge.cluster.ray_session import RaySession, room_for
from evomerge.cluster.ray_worker import Started, Worker
from evomerge.core import EngineError, Evaluation, EvaluationRequest, Json, LostWorker, Split

__all__ = ["RayPool", "RaySession", "WorkerOptions"]

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""how often the pool checks for workers that have been placed on a node, and for nodes that have joined or left"""

REST_S = 60.0
"""After this long, a worker that could not start is started again, while others work or start."""

_MAX_REASON = 500
"""maximum length in characters"""

_CAUSE_UNKNOWN = "worker process has died"
"""part of Ray's message for an actor whose process ended for unknown reasons"""

_DIED = "the process was killed (by the system if memory ran out) or crashed"

MAX_NODE_LOSSES = 10
"""A request that was lost with this many nodes fails, even though it may not be the cause."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Resources and limits of the workers.

    Attributes:
        n_workers: number of actors; None = as many as there is room for, now and later.
        cpus, gpus: Ray resources of each worker.
        environment: environment variables that are set before its Python starts.
        max_attempts: how often a request is tried whose worker dies or hangs.
        evaluation_timeout_s: an evaluation that runs longer than this counts as hung.
        startup_timeout_s: how long a worker may take to start, once it has been placed on a node.
        log_folder: folder in which each worker writes `worker-<n>.log`; None = no logs.
        versions: package -> version on this machine; logs a warning for machines with other versions.
    """

    n_workers: int | None
    cpus: float
    gpus: float
    environment: Mapping[str, str]
    max_attempts: int
    evaluation_timeout_s: float
    startup_timeout_s: float
    log_folder: str | None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Slot:
    """The state of a worker: its actor, its current task (first its start, then its evaluation), and since when it runs."""

    index: int
    place: Any
    actor: Any
    task: Any
    since: float
    request: EvaluationRequest | None = None
    is_placed: bool = False
    node: str | None = None
    n_failed_starts: int = 0

    @property
    def is_ready(self) -> bool:
        return self.node is not None

    @property
    def is_hopeful(self) -> bool:
        """Whether it is ready, or is starting on a node and has not failed at that yet."""
        return self.is_ready or (self.is_placed and not self.n_failed_starts)


class RayPool:
    """A pool of Ray actors; a `RaySession` must be open.

    Args:
        factory, settings: the arguments with which a worker calls `make_evaluator`.
        options: see `WorkerOptions`.
    """

    def __init__(self, factory: str, settings: Mapping[str, Json], options: WorkerOptions) -> None:
        self._factory, self._settings, self._options = factory, settings, options
        self._actor_class: Any = ray.remote(Worker)
        self._queue: deque[EvaluationRequest] = deque()
        self._done: deque[Evaluation | LostWorker] = deque()
        self._idle: deque[_Slot] = deque()
        self._resting: dict[int, float] = {}
        self._has_worked = False
        self._different: set[str] = set()
        self._node_losses: Counter[tuple[str, Split]] = Counter()
        self._looked = time.monotonic()
        self._slots: dict[int, _Slot] = {}
        for index in range(self._target()):
            self._start(index)

    @property
    def n_workers(self) -> int:
        """The number of workers, including those that start as soon as there is room."""
        return len(self._slots)

    def submit(self, request: EvaluationRequest) -> None:
        """Queue a request for the next free worker. One that has already lost `max_attempts` workers fails at once."""
        if request.attempt >= self._options.max_attempts:
            self._done.append(_quarantined(request, request.attempt, "before this process started"))
            return
        self._queue.append(request)
        self._dispatch()

    def next_done(self, timeout_s: float) -> Evaluation | LostWorker | None:
        """The next finished evaluation or lost worker; None if there is none within `timeout_s`.

        Raises:
            EvomergeError: a worker's evaluator could not be made, and none has been made before; the worker's own error.
            EngineError: a worker has failed to start `max_attempts` times, and no other is ready or starting for the first time.
        """
        if not self._done:
            self._collect(timeout_s)
        self._dispatch()
        return self._done.popleft() if self._done else None

    def withdraw(self) -> list[EvaluationRequest]:
        """Remove and return the requests that no worker has started."""
        withdrawn = list(self._queue)
        self._queue.clear()
        return withdrawn

    def close(self) -> None:
        """Kill the workers."""
        for slot in self._slots.values():
            self._remove(slot)

    def _target(self) -> int:
        wanted = self._options.n_workers
        return max(1, room_for(self._options.cpus, self._options.gpus)) if wanted is None else wanted

    def _start(self, index: int, n_failed_starts: int = 0) -> None:
        options = self._options
        needs = {name: amount for name, amount in (("CPU", options.cpus), ("GPU", options.gpus)) if amount}
        place = placement_group([needs])
        actor = self._actor_class.options(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            max_restarts=0,
            # Ray's head node would keep 3 kB per evaluation
            enable_task_events=False,
            # without variables there is no runtime environment to set up, which may fail or be slow
            runtime_env={"env_vars": dict(options.environment)} if options.environment else None,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=place),
        ).remote(self._log_file(index))
        started = actor.start.remote(self._factory, self._settings, list(options.versions))
        self._slots[index] = _Slot(index, place, actor, started, time.monotonic(), n_failed_starts=n_failed_starts)

    def _log_file(self, index: int) -> str | None:
        folder = self._options.log_folder
        return None if folder is None else str(Path(folder) / f"worker-{index}.log")

    def _remove(self, slot: _Slot) -> None:
        ray.kill(slot.actor)
        remove_placement_group(slot.place)

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            slot = self._idle.popleft()
            slot.request = self._queue.popleft()
            slot.task = slot.actor.evaluate.remote(slot.request)
            slot.since = time.monotonic()

    def _collect(self, timeout_s: float) -> None:
        running = {slot.task: slot for slot in self._slots.values() if slot.task is not None}
        if running:
            finished, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            if not finished and timeout_s:
                finished, _ = ray.wait(list(running), num_returns=1, timeout=timeout_s)
            for task in finished:
                self._collect_result(running[task])
        elif timeout_s:
            time.sleep(timeout_s)
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._update_workers()
        for slot in list(self._slots.values()):
            self._check_time(slot)

    def _collect_result(self, slot: _Slot) -> None:
        """Process the result or failure of a slot whose task has ended."""
        try:
            answer = ray.get(slot.task, timeout=0)
        except GetTimeoutError:
            return
        except RayError as problem:
            reason = _DIED if _CAUSE_UNKNOWN in str(problem) else _reason(problem)
            self._replace(slot, reason, blameless=self._lost_its_node(slot, problem))
            return
        slot.task = None
        if slot.request is not None:
            slot.request = None
            self._done.append(answer)
        elif not self._has_started(slot, answer):
            return
        self._idle.append(slot)

    def _has_started(self, slot: _Slot, started: Started) -> bool:
        """Put a worker into use, or replace it if it has a problem. Raises the problem if no worker has ever started."""
        if started.problem is not None:
            where = f"on {started.host}: " if sum(node["Alive"] for node in ray.nodes()) > 1 else ""
            if not self._has_worked:
                raise type(started.problem)(f"{where}{started.problem}")
            self._replace(slot, f"{where}{started.problem}", blameless=False)
            return False
        slot.node, slot.n_failed_starts = started.node, 0
        self._has_worked = True
        other = [
            f"{name} {started.versions[name]} instead of {here}"
            for name, here in self._options.versions.items()
            if name in started.versions and _public(started.versions[name]) != _public(here)
        ]
        if other and started.host not in self._different:
            self._different.add(started.host)
            logger.warning("%s has %s: its scores may differ", started.host, ", ".join(other))
        return True

    def _check_time(self, slot: _Slot) -> None:
        if slot.task is None or not (slot.is_placed or slot.is_ready):
            return
        limit = self._options.evaluation_timeout_s if slot.is_ready else self._options.startup_timeout_s
        if time.monotonic() - slot.since > limit:
            what = "evaluation" if slot.is_ready else "start"
            self._replace(slot, f"the worker's {what} took more than {limit:g} s", blameless=False)

    def _replace(self, slot: _Slot, reason: str, *, blameless: bool) -> None:
        """Replace a worker that died, hung or could not start; its request goes back to the head of the queue, or fails."""
        log_file = self._log_file(slot.index)
        logger.warning("replacing worker %d: %s%s", slot.index, reason, "" if log_file is None else f"; see {log_file}")
        self._remove(slot)
        del self._slots[slot.index]
        if slot.request is not None:
            self._retry_or_fail(slot.request, reason, blameless=blameless)
        failures = slot.n_failed_starts + (not slot.is_ready and not blameless)
        if failures < self._options.max_attempts:
            self._start(slot.index, failures)
        elif not any(other.is_hopeful for other in self._slots.values()):
            raise EngineError(f"worker {slot.index} cannot start: {reason}")
        else:
            self._resting[slot.index] = time.monotonic() + REST_S

    def _retry_or_fail(self, request: EvaluationRequest, reason: str, *, blameless: bool) -> None:
        key = (request.candidate_id, request.split)
        if blameless:
            self._node_losses[key] += 1
            if self._node_losses[key] < MAX_NODE_LOSSES:
                self._queue.appendleft(request)
            else:
                self._done.append(request.failed(f"lost with {MAX_NODE_LOSSES} nodes; the last: {reason}"))
            return
        self._done.append(LostWorker(request.candidate_id, request.split, reason))
        attempts = request.attempt + 1
        if attempts < self._options.max_attempts:
            self._queue.appendleft(replace(request, attempt=attempts))
        else:
            self._done.append(_quarantined(request, attempts, reason))

    def _update_workers(self) -> None:
        """Check which workers have been placed, and adjust their number if the cluster has grown or shrunk."""
        self._looked = now = time.monotonic()
        for slot in self._slots.values():
            if not slot.is_placed and not slot.is_ready:
                slot.is_placed = placement_group_table(slot.place).get("state") == "CREATED"
                slot.since = now  # the time until it is placed does not count as starting
        for index, until in list(self._resting.items()):
            if now > until:
                del self._resting[index]
                self._start(index, self._options.max_attempts - 1)
        target = self._target()
        for index in range(target):
            if index not in self._slots and index not in self._resting:
                self._start(index)
        for slot in list(self._slots.values()):
            if slot.index >= target and not slot.is_placed and not slot.is_ready:
                self._remove(slot)
                del self._slots[slot.index]

    def _lost_its_node(self, slot: _Slot, problem: RayError) -> bool:
        """Whether the node was lost rather than just the process, so that the candidate is not to blame."""
        if isinstance(problem, NodeDiedError | ActorUnavailableError) or "node has died" in str(problem):
            return True
        return slot.node is not None and any(node["NodeID"] == slot.node and not node["Alive"] for node in ray.nodes())


def _quarantined(request: EvaluationRequest, n_lost: int, reason: str) -> Evaluation:
    """The failed evaluation of a request that is not retried, because `n_lost` workers were lost with it."""
    return request.failed(f"quarantined: {n_lost} workers were lost while evaluating it; the last: {reason}")


def _public(version: str) -> str:
    """A version without the suffix for different hardware (`2.9.0+cpu`)."""
    return version.partition("+")[0]


def _reason(problem: RayError) -> str:
    """The informative part of Ray's long message: the exception at the end of a remote traceback, otherwise the first line."""
    lines = str(problem).splitlines()
    frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]
    if frames:
        rest = lines[frames[-1] + 1 :]
        start = next((number for number, line in enumerate(rest) if line and not line.startswith(" ")), 0)
        lines = rest[start:]
    else:
        lines = next(([line] for line in lines if line.strip()), [type(problem).__name__])
    return " ".join(" ".join(lines).split())[:_MAX_REASON]
