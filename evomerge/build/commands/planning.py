"""Estimates what a search would take: sizes from the models' headers, time and cost from measured times per candidate.

`simulate` runs the real loop and the real strategy with scores of a test function and a virtual clock. It evaluates no models.
"""

import heapq
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from evomerge.build.commands.changes import differences
from evomerge.build.commands.reading import open_run
from evomerge.build.commands.runs import run_event
from evomerge.build.engines import engine_bytes, merge_methods, ranks_of
from evomerge.build.problem import Problem
from evomerge.build.sources import written_dtype
from evomerge.build.strategies import strategy_for
from evomerge.build.tasks import needed_splits
from evomerge.config import SyntheticConfig
from evomerge.core import ConfigError, Evaluation, EvaluationRequest, FilePath, Split, Status, cost_key, random_stream
from evomerge.plan import statistics_bytes
from evomerge.search import Budget, RunDirectory, RunRecorder, RunState, SearchLoop, run_finals

logger = logging.getLogger(__name__)

MAX_SIMULATED = 600
"""Longer searches are simulated up to this number of candidates; the rest is extrapolated from the second half."""

_HEADER_BYTES = 450
"""size of a candidate's three journal lines without its coordinates"""

_COORDINATE_BYTES = 20
"""size of a coordinate in the journal, in Python's shortest exact form"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a search.

    Attributes:
        dimension: number of coordinates of a candidate.
        n_objectives: number of objectives.
        candidate_bytes: merged weights of one candidate; 0 for the synthetic evaluation.
        engine_bytes: the same weights in the compute dtype of the engine on this machine.
        source_bytes: weights of all sources, resident in each worker.
        rank_bytes: ranks that `della` methods and `sce` keep in addition, in all processes of an engine together.
        statistics_bytes: histograms, or random masks and norms, approximately; likewise.
        journal_bytes: one candidate on disk, without item scores.
    """

    dimension: int
    n_objectives: int
    candidate_bytes: int
    engine_bytes: int
    source_bytes: int
    rank_bytes: int
    statistics_bytes: int
    journal_bytes: int

    @property
    def worker_bytes(self) -> int:
        """Memory of a worker: sources, ranks and statistics of them, and the engine's weights, but not the engine's caches."""
        return self.source_bytes + self.rank_bytes + self.statistics_bytes + self.engine_bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """A forecast of a search with a given number of workers.

    Attributes:
        workers: number of workers.
        evaluations: number of evaluations on all splits.
        wall_s: wall time from the first ask to the end of the finals, without the start of the workers.
        utilisation: share of the time that workers are busy, in [0, 1].
        driver_s: CPU time of the driver per candidate, in seconds.
        cost: workers x hours x price of a worker hour; None without a price.
    """

    workers: int
    evaluations: int
    wall_s: float
    utilisation: float
    driver_s: float
    cost: float | None


def sizes(problem: Problem) -> Sizes:
    """The sizes of a search, from the models' headers alone."""
    config, headers = problem.config, problem.headers
    methods, processes = merge_methods(config), config.engine.tensor_parallel
    candidate = problem.candidate_bytes
    return Sizes(
        dimension=problem.space.dimension,
        n_objectives=len(problem.objectives),
        candidate_bytes=candidate,
        engine_bytes=round(engine_bytes(config, candidate, written_dtype(config, headers))) if headers else 0,
        source_bytes=sum(header.n_bytes for header in headers.values()),
        rank_bytes=ranks_of(methods, headers) * processes,
        statistics_bytes=statistics_bytes(methods, list(headers.values())[1:]) * processes,
        journal_bytes=_HEADER_BYTES + _COORDINATE_BYTES * problem.space.dimension,
    )


@dataclass(frozen=True, slots=True)
class Times:
    """Times and items per candidate.

    Attributes:
        seconds: split -> time of each candidate that was measured on it; missing splits are assumed to take as long as `search`.
        items: number of items per candidate on `search`; None if unknown.
    """

    seconds: Mapping[Split, Sequence[float]]
    items: float | None = None

    def on(self, split: Split) -> Sequence[float]:
        """Times of candidates on a split, in seconds."""
        return self.seconds.get(split) or self.seconds[Split.SEARCH]


def same_time(problem: Problem, seconds: float) -> Times:
    """Times if every candidate takes `seconds`."""
    evaluation = problem.config.evaluation
    items = evaluation.n_items * len(problem.task_names) if isinstance(evaluation, SyntheticConfig) else None
    return Times({Split.SEARCH: [seconds]}, items)


def measured_times(problem: Problem, run: FilePath) -> Times:
    """Times of the candidates of a run; logs a warning if `problem` scores candidates on other items.

    Raises:
        JournalError: `run` is not a run directory.
        ConfigError: no candidate has been evaluated in it.
    """
    seconds: dict[Split, list[float]] = {}
    items = []
    measured = open_run(run)
    planned, there = (
        {key: config.model_dump(mode="json")[key] for key in ("tasks", "evaluation")}
        for config in (problem.config, measured.config)
    )
    other = [key for key, _, _ in differences(there, planned)]
    if other:
        logger.warning(
            "%s ran with other settings (%s), so its times and items may differ from those of this search",
            run,
            ", ".join(other),
        )
    for evaluation in measured.state.evaluations.values():
        if evaluation.status is Status.OK and "total_s" in evaluation.cost:
            seconds.setdefault(evaluation.split, []).append(evaluation.cost["total_s"])
            if evaluation.split is Split.SEARCH and "items" in evaluation.cost:
                items.append(evaluation.cost["items"])
    if Split.SEARCH not in seconds:
        raise ConfigError(f"{run}: no candidate has been evaluated in this run, so there are no times to plan with")
    untimed = [split for split in needed_splits(problem.config) if split not in seconds]
    if untimed:
        logger.warning(
            "%s has evaluated nothing on %s; candidates are assumed to take as long there as on search, whatever the number of items",
            run,
            " and ".join(untimed),
        )
    return Times(seconds, fmean(items) if items else None)


def n_candidates(problem: Problem, times: Times, workers: int) -> int:
    """The number of candidates that the budget allows on the search split.

    Raises:
        ConfigError: only items are limited, and the number of items per candidate is unknown.
    """
    budget = problem.config.budget
    limits = []
    if budget.evaluations is not None:
        limits.append(budget.evaluations)
    if budget.hours is not None:
        limits.append(max(1, int(budget.hours * 3600 * workers / fmean(times.on(Split.SEARCH)))))
    if budget.items is not None and times.items:
        limits.append(max(1, int(budget.items / times.items)))
    if not limits:
        raise ConfigError(
            "the number of candidates cannot be computed from budget.items alone; use --from RUN with a short run on the same tasks, or add "
            "budget.evaluations or budget.hours"
        )
    return min(limits)


def forecast(problem: Problem, times: Times, workers: int, price: float | None = None) -> Forecast:
    """An estimate without simulation: assumes that workers are always busy, except at the end of the search and of each stage of the finals.

    Args:
        problem: the search.
        times: times per candidate.
        workers: number of workers.
        price: price of a worker hour.
    """
    n_search = max(n_candidates(problem, times, workers), len(problem.baselines()))
    stages = {Split.SEARCH: n_search, **_finals(problem, n_search)}
    means = {split: fmean(times.on(split)) for split in stages}
    wall = sum(means[split] * -(-count // workers) for split, count in stages.items())
    busy = sum(means[split] * count for split, count in stages.items()) / (workers * wall)
    return Forecast(workers, sum(stages.values()), wall, busy, 0.0, _cost(workers, wall, price))


def simulate(problem: Problem, times: Times, workers: int, price: float | None = None) -> Forecast:
    """Like `forecast`, but runs the loop on a virtual clock: includes waiting caused by the strategy, by deterministic order or by the finals.

    Candidates take times drawn from `times`. Simulates at most `MAX_SIMULATED` candidates, or 4 per worker if that is more.
    """
    wanted = n_candidates(problem, times, workers)
    pool = _SimulatedPool(problem, times)
    started = time.process_time()
    state, search_s = _run_through(problem, pool, min(wanted, max(MAX_SIMULATED, 4 * workers)), workers)
    n_done, reached = len(state.evaluations), state.n_evaluations[Split.SEARCH]
    driver = (time.process_time() - started) / n_done
    rest = max(0, wanted - reached) if "evaluations" in state.stopped else 0
    wall = pool.now + rest * pool.pace(search_s, reached)
    work = pool.worked_s + rest * fmean(times.on(Split.SEARCH))
    return Forecast(
        workers, n_done + rest, wall, min(1.0, work / (workers * wall)), driver, _cost(workers, wall, price)
    )


def _run_through(problem: Problem, pool: "_SimulatedPool", count: int, workers: int) -> tuple[RunState, float]:
    """Simulate a search of `count` candidates and its finals; return the state, and the pool's time at the end of the search."""
    with tempfile.TemporaryDirectory(prefix="evomerge-plan-") as name:
        recorder = RunRecorder(RunDirectory(Path(name)))
        recorder.record(run_event(problem, in_flight=workers))
        loop = SearchLoop(
            strategy=strategy_for(problem),
            pool=pool,
            recorder=recorder,
            make_recipe=lambda candidate: None,
            baselines=problem.baselines(),
            budget=Budget(count),
            in_flight=workers,
            deterministic=problem.config.deterministic,
            observers=[pool.look],
        )
        state = loop.run()
        search_s = pool.now
        if problem.config.finals.finalists:
            run_finals(loop, recorder, problem.config.finals.finalists)
        recorder.close()
    return state, search_s


class _SimulatedPool:
    """Workers on a virtual clock: the next result is always the one that is done first."""

    def __init__(self, problem: Problem, times: Times) -> None:
        self._names = [objective.name for objective in problem.objectives]
        self._times = times
        self._draw = random_stream(problem.config.seed, "plan")
        self._running: list[tuple[float, int, EvaluationRequest]] = []
        self._count = 0
        self._ends: list[float] = []
        self.now = 0.0
        self.worked_s = 0.0

    def submit(self, request: EvaluationRequest) -> None:
        """Start a request now; the loop never submits more of them than there are workers."""
        times = self._times.on(request.split)
        seconds = float(times[int(self._draw.integers(len(times)))])
        self._count += 1
        self.worked_s += seconds
        heapq.heappush(self._running, (self.now + seconds, self._count, request))

    def next_done(self, timeout_s: float) -> Evaluation | None:
        """Move the clock to the end of the next request and return its result; None if the loop does not wait (`timeout_s` 0)."""
        if not self._running or timeout_s <= 0:
            return None
        self.now, _, request = heapq.heappop(self._running)
        values = np.asarray(request.values if request.values is not None else [0.5])
        scores: dict[str, float] = {}
        for index, name in enumerate(self._names):
            best = 0.2 + 0.6 * index / max(1, len(self._names) - 1)
            scores[name] = float(1.0 - np.mean((values - best) ** 2))
        cost = {key: 1.0 for name in self._names if (key := cost_key(name))}
        return Evaluation(request.candidate_id, request.split, Status.OK, scores, cost={"items": 0.0, **cost})

    def withdraw(self) -> list[EvaluationRequest]:
        """Nothing: all requests have started."""
        return []

    def look(self, state: object, evaluation: Evaluation) -> None:
        """Record when results on the search split arrive."""
        if evaluation.split is Split.SEARCH:
            self._ends.append(self.now)

    def pace(self, end: float, count: int) -> float:
        """Seconds between two results in the second half of the search."""
        if count < 2:
            return end
        middle = self._ends[count // 2 - 1]
        return (end - middle) / (count - count // 2)


def _finals(problem: Problem, n_search: int) -> dict[Split, int]:
    """The maximum number of evaluations on `select` and `report`; fewer on `report` if the winner is a baseline."""
    finalists, n_baselines = problem.config.finals.finalists, len(problem.baselines())
    more = {Split.SELECT: finalists, Split.REPORT: 1} if finalists else {}
    return {split: min(n_search, n_baselines + count) for split, count in more.items()}


def _cost(workers: int, wall_s: float, price: float | None) -> float | None:
    return None if price is None else workers * wall_s / 3600 * price


def synthetic_times(problem: Problem) -> Times | None:
    """Times of the synthetic evaluation, from its configured delay; None for other evaluations."""
    evaluation = problem.config.evaluation
    return same_time(problem, max(evaluation.delay_s, 1e-6)) if isinstance(evaluation, SyntheticConfig) else None


def as_json(what: Sizes, forecasts: Sequence[Forecast]) -> Mapping[str, object]:
    """A plan as JSON, in seconds and bytes."""
    return {
        "sizes": {**asdict(what), "worker_bytes": what.worker_bytes},
        "forecasts": [asdict(row) for row in forecasts],
    }
