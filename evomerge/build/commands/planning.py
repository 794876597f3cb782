"""What a search would take before it is started: sizes from the models' headers, time and cost from measured times of candidates.

`simulate` runs the real loop with the real strategy, on scores of a test function and a clock that only counts. It needs no models.
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
from evomerge.build.engines import engine_bytes, merge_methods, ranks_of
from evomerge.build.problem import Problem
from evomerge.build.sources import written_dtype
from evomerge.build.strategies import strategy_for
from evomerge.build.tasks import needed_splits
from evomerge.config import SyntheticConfig
from evomerge.core import ConfigError, Evaluation, EvaluationRequest, FilePath, Split, Status, random_stream
from evomerge.plan import statistics_bytes
from evomerge.search import FORMAT_VERSION, Budget, RunDirectory, RunRecorder, RunState, SearchLoop, event, run_finals

logger = logging.getLogger(__name__)

MAX_SIMULATED = 600
"""Longer searches are simulated up to here; the rest goes on at the pace of the second half."""

_HEADER_BYTES = 450
"""A candidate's three journal lines without its coordinates."""

_COORDINATE_BYTES = 20
"""A coordinate in the journal, in Python's shortest exact form."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a search holds.

    Attributes:
        dimension: coordinates of a candidate.
        n_objectives: scores that are optimised.
        candidate_bytes: merged weights of one candidate; 0 for the synthetic evaluation.
        engine_bytes: the same as the engine here holds them, in the dtype that it computes in.
        source_bytes: weights of every source, resident in each worker.
        rank_bytes: ranks that `della` methods and `sce` keep beside them, in each process of an engine.
        statistics_bytes: about what histograms, or random masks and norms, take there.
        journal_bytes: of one candidate on disk, item scores not counted.
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
        """What a worker holds: sources, what it knows of them, and the engine's weights; its engine's caches come on top."""
        return self.source_bytes + self.rank_bytes + self.statistics_bytes + self.engine_bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a number of workers makes of a search.

    Attributes:
        workers: how many.
        evaluations: all splits together.
        wall_s: from the first ask to the end of the finals; the workers' start is not in it.
        utilisation: share of the workers' time that is work, in [0, 1].
        driver_s: what the driver computes for one candidate, in seconds.
        cost: workers x hours x price of a worker's hour; None without a price.
    """

    workers: int
    evaluations: int
    wall_s: float
    utilisation: float
    driver_s: float
    cost: float | None


def sizes(problem: Problem) -> Sizes:
    """The sizes of a search, from headers alone."""
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
    """What candidates take.

    Attributes:
        seconds: split -> of each candidate that was timed on it; a split that is missing takes as long as `search`.
        items: of a candidate on `search`; None where that is not known.
    """

    seconds: Mapping[Split, Sequence[float]]
    items: float | None = None

    def on(self, split: Split) -> Sequence[float]:
        """Seconds of candidates on a split."""
        return self.seconds.get(split) or self.seconds[Split.SEARCH]


def same_time(problem: Problem, seconds: float) -> Times:
    """Every candidate takes so many seconds."""
    evaluation = problem.config.evaluation
    items = evaluation.n_items * len(problem.task_names) if isinstance(evaluation, SyntheticConfig) else None
    return Times({Split.SEARCH: [seconds]}, items)


def measured_times(problem: Problem, run: FilePath) -> Times:
    """What the candidates of a run took; a warning says where `problem` scores candidates on other items.

    Raises:
        JournalError: not a run directory.
        ConfigError: nothing in it has been timed.
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
            "%s ran with other settings (%s), so its times and items are not those of this search",
            run,
            ", ".join(other),
        )
    for item in measured.state.evaluations.values():
        if item.status is Status.OK and "total_s" in item.cost:
            seconds.setdefault(item.split, []).append(item.cost["total_s"])
            if item.split is Split.SEARCH and "items" in item.cost:
                items.append(item.cost["items"])
    if Split.SEARCH not in seconds:
        raise ConfigError(f"{run}: no candidate has been evaluated there, so there are no times to plan with")
    untimed = [split for split in needed_splits(problem.config) if split not in seconds]
    if untimed:
        logger.warning(
            "%s has evaluated nothing on %s, where a candidate is planned to take as long as on search, however many items there are",
            run,
            " and ".join(untimed),
        )
    return Times(seconds, fmean(items) if items else None)


def n_candidates(problem: Problem, times: Times, workers: int) -> int:
    """How many candidates the budget allows on the search split.

    Raises:
        ConfigError: it is limited by items alone, and how many a candidate takes is not known.
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
            "budget.items alone does not say how many candidates there will be; plan with --from RUN, a short run on the same tasks, or add "
            "budget.evaluations or budget.hours"
        )
    return min(limits)


def forecast(problem: Problem, times: Times, workers: int, price: float | None = None) -> Forecast:
    """An estimate without simulation: every worker is always busy, but for the last candidates of search and finals.

    Args:
        problem: what is searched.
        times: what candidates take.
        workers: how many work.
        price: of a worker's hour.
    """
    n_search = max(n_candidates(problem, times, workers), len(problem.baselines()))
    stages = {Split.SEARCH: n_search, **_finals(problem, n_search)}
    means = {split: fmean(times.on(split)) for split in stages}
    wall = sum(means[split] * -(-count // workers) for split, count in stages.items())
    busy = sum(means[split] * count for split, count in stages.items()) / (workers * wall)
    return Forecast(workers, sum(stages.values()), wall, busy, 0.0, _cost(workers, wall, price))


def simulate(problem: Problem, times: Times, workers: int, price: float | None = None) -> Forecast:
    """As `forecast`, by running the loop: shows where a strategy, the order of a deterministic run or the finals make workers wait.

    Candidates take times drawn from `times`. At most `MAX_SIMULATED` candidates are run through.
    """
    wanted = n_candidates(problem, times, workers)
    pool = _CountingPool(problem, times)
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


def _run_through(problem: Problem, pool: "_CountingPool", count: int, workers: int) -> tuple[RunState, float]:
    """The search of `count` candidates and its finals; what they came to, and the pool's time when the search ended."""
    with tempfile.TemporaryDirectory(prefix="evomerge-plan-") as name:
        recorder = RunRecorder(RunDirectory(Path(name)))
        recorder.record(
            event("run", objectives=[objective.to_json() for objective in problem.objectives], version=FORMAT_VERSION)
        )
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


class _CountingPool:
    """Workers whose time only counts: the next result is always that of the earliest end."""

    def __init__(self, problem: Problem, times: Times) -> None:
        self._names = [item.name for item in problem.objectives]
        self._times = times
        self._draw = random_stream(problem.config.seed, "plan")
        self._running: list[tuple[float, int, EvaluationRequest]] = []
        self._count = 0
        self._ends: list[float] = []
        self.now = 0.0
        self.worked_s = 0.0

    def submit(self, request: EvaluationRequest) -> None:
        """Starts a request now; the loop never has more of them than workers."""
        times = self._times.on(request.split)
        seconds = float(times[int(self._draw.integers(len(times)))])
        self._count += 1
        self.worked_s += seconds
        heapq.heappush(self._running, (self.now + seconds, self._count, request))

    def next_done(self, timeout_s: float) -> Evaluation | None:
        """The next end; the clock jumps to it. Nothing where the loop only asks whether more is there already."""
        if not self._running or timeout_s <= 0:
            return None
        self.now, _, request = heapq.heappop(self._running)
        values = np.asarray(request.values if request.values is not None else [0.5])
        scores: dict[str, float] = {}
        for index, name in enumerate(self._names):
            best = 0.2 + 0.6 * index / max(1, len(self._names) - 1)
            scores[name] = float(1.0 - np.mean((values - best) ** 2))
        cost = {name.removeprefix("cost."): 1.0 for name in self._names if name.startswith("cost.")}
        return Evaluation(request.candidate_id, request.split, Status.OK, scores, cost={"items": 0.0, **cost})

    def withdraw(self) -> list[EvaluationRequest]:
        """Nothing: all have begun."""
        return []

    def look(self, state: object, evaluation: Evaluation) -> None:
        """Notes when results of the search split came."""
        if evaluation.split is Split.SEARCH:
            self._ends.append(self.now)

    def pace(self, end: float, count: int) -> float:
        """Seconds between two results in the second half of the search."""
        if count < 2:
            return end
        middle = self._ends[count // 2 - 1]
        return (end - middle) / (count - count // 2)


def _finals(problem: Problem, n_search: int) -> dict[Split, int]:
    """The most evaluations there may be on `select` and on `report`; the winner may be a baseline, which counts once."""
    finalists, n_baselines = problem.config.finals.finalists, len(problem.baselines())
    more = {Split.SELECT: finalists, Split.REPORT: 1} if finalists else {}
    return {split: min(n_search, n_baselines + count) for split, count in more.items()}


def _cost(workers: int, wall_s: float, price: float | None) -> float | None:
    return None if price is None else workers * wall_s / 3600 * price


def synthetic_times(problem: Problem) -> Times | None:
    """The configured delay of the synthetic evaluation; None where models are needed to know."""
    evaluation = problem.config.evaluation
    return same_time(problem, max(evaluation.delay_s, 1e-6)) if isinstance(evaluation, SyntheticConfig) else None


def as_json(what: Sizes, forecasts: Sequence[Forecast]) -> Mapping[str, object]:
    """A plan as JSON; seconds and bytes."""
    return {
        "sizes": {**asdict(what), "worker_bytes": what.worker_bytes},
        "forecasts": [asdict(item) for item in forecasts],
    }
