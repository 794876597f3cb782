"""Follows a run while another process works on it. Each look reads what is new in the journal; never writes, never locks."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.build.commands.reading import outcome, recorded_config
from evomerge.core import Evaluation, FilePath, Objective, Split, Status
from evomerge.search import HolderWatch, JournalReader, RunDirectory, RunState, best_key, in_finals, utility

N_BEST = 5
"""how many of the best candidates are shown"""

N_RECENT = 64
"""The rate is computed from this many of the last evaluations, but at least four per worker, since they arrive in bursts."""


@dataclass(frozen=True, slots=True)
class Look:
    """The current state of a run.

    Attributes:
        status: whether and where it is running; otherwise how it ended and how to continue.
        over: whether it is not running any more.
        sure: whether `over` is known; False for some seconds if a process on another machine works on it and no heartbeat has been seen yet.
        n_evaluations: number of evaluations on the search split, baselines included; the budget is `n_budget`, None = no such limit.
        n_failed: number of failed evaluations on all splits.
        n_lost: number of workers that died or hung while evaluating a candidate.
        n_pending: number of candidates that were asked but not yet told.
        elapsed_s: wall time of all sessions.
        per_minute: rate of the last evaluations; None if there are too few.
        remaining_s: time until the budget of evaluations is used up at that rate.
        best: (id, scores in the order of the objectives, mean), best first.
        last_error: why the last failed candidate failed.
    """

    status: str
    over: bool
    sure: bool
    n_evaluations: int
    n_budget: int | None
    n_failed: int
    n_lost: int
    n_pending: int
    elapsed_s: float
    per_minute: float | None
    remaining_s: float | None
    best: tuple[tuple[str, tuple[float, ...], float], ...]
    last_error: str | None


class Watcher:
    """Follows the run in `folder`.

    Raises:
        JournalError: `folder` is not a run directory, or the run is damaged.
    """

    def __init__(self, folder: FilePath) -> None:
        self._directory = RunDirectory(Path(folder))
        self.config = recorded_config(self._directory)
        self._reader = JournalReader(self._directory.journal)
        self._holder = HolderWatch(self._directory.folder)
        self._state = RunState()
        self._n_lost = 0
        self._times: deque[float] = deque()
        self._n_starting = 0
        self._best: list[Evaluation] = []

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is optimised."""
        return self._state.objectives

    @property
    def strategy(self) -> str:
        """The strategy's name; for `auto`, the one that was chosen once the run has started."""
        return str(self._state.run.get("strategy", self.config.strategy.name))

    def look(self) -> Look:
        """Read new events and return the current state.

        Raises:
            JournalError: the journal is damaged.
        """
        for event in self._reader.new_events():
            self._state.apply(event)
            self._count(event)
        state = self._state
        status, over, sure = self._status()
        count, wanted = state.n_evaluations[Split.SEARCH], self.config.budget.evaluations
        rate = None
        if len(self._times) > 1 and self._times[-1] > self._times[0]:
            rate = 60 * (len(self._times) - 1) / (self._times[-1] - self._times[0])
        left = None if rate is None or wanted is None or over or state.stopped else 60 * max(0, wanted - count) / rate
        return Look(
            status=status,
            over=over,
            sure=sure,
            n_evaluations=count,
            n_budget=wanted,
            n_failed=state.evaluations.count(Status.FAILED),
            n_lost=self._n_lost,
            n_pending=len(state.pending),
            elapsed_s=state.elapsed_s,
            per_minute=rate,
            remaining_s=left,
            best=tuple(map(self._row, self._best)),
            last_error=state.last_error,
        )

    def _row(self, evaluation: Evaluation) -> tuple[str, tuple[float, ...], float]:
        """An entry of `Look.best`."""
        scores = tuple(evaluation.value(objective.name) for objective in self.objectives)
        return evaluation.candidate_id, scores, utility(self.objectives, evaluation)

    def _count(self, event: Mapping[str, object]) -> None:
        if event["event"] == "session":
            workers = int(str(event["workers"]))
            self._times = deque(maxlen=max(N_RECENT, 4 * workers))
            self._n_starting = workers - 1
        elif event["event"] == "lost":
            self._n_lost += 1
        elif event["event"] == "evaluated" and event["split"] == Split.SEARCH.value:
            evaluation = self._state.evaluations[str(event["id"]), Split.SEARCH]
            if self._n_starting:  # the first results of all workers arrive together, once the engines have started
                self._n_starting -= 1
            else:
                self._times.append(float(str(event["elapsed_s"])))
            if evaluation.status is Status.OK:
                known = [*self._best, evaluation]
                self._best = sorted(known, key=lambda done: best_key(self._state, done), reverse=True)[:N_BEST]

    def _doing(self) -> str:
        if not self._state.stopped:
            return "searching"
        if not self.config.finals.finalists:
            return "ending"
        for split in (Split.SELECT, Split.REPORT):
            names = in_finals(self._state, split)
            n_done = sum((name, split) in self._state.evaluations for name in names)
            if n_done < len(names):
                break
        return f"in the finals ({n_done} of {len(names)} evaluated on {split})"

    def _status(self) -> tuple[str, bool, bool]:
        holder = self._holder.look()
        if holder is not None and holder[1] is not False:
            return f"{self._doing()}, {holder[0]}", False, holder[1] is not None
        ended = outcome(self._state, self.config)
        if ended is not None:
            best = f"; the best is {self._state.best_id}" if self._state.finished else ""
            return f"{ended}{best}", True, True
        return f"not running; continue with `{self._directory.resume_command}`", True, True
