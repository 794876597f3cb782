"""`SearchLoop`: the ask/evaluate/tell loop. Steady state without barriers: a free worker always gets the next candidate.

Works with strategies, requests and evaluations; never with models, tensors or Ray handles. Every step is durable before anything outside
the process sees it, so `SearchLoop.run` on an existing run directory continues where the last process stopped. Results that arrive together are
made durable together, and no step becomes slower as a run grows.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.core import (
    Candidate,
    Evaluation,
    EvaluationError,
    EvaluationRequest,
    Json,
    LostWorker,
    Split,
    Status,
)
from evomerge.search import events
from evomerge.search.budget import Budget
from evomerge.search.recorder import RunRecorder
from evomerge.search.state import RunState
from evomerge.search.tables import Entry
from evomerge.strategy import Strategy

logger = logging.getLogger(__name__)

POLL_S = 0.25
"""how long to wait for results before checking for interrupts"""

MAX_GROUP = 256
"""maximum number of results that are made durable together; bounds what a crash can lose"""

HOLD_S = 0.05
"""maximum time that a slow strategy's proposals are held back to be made durable together"""


class WorkerPool(Protocol):
    """Evaluates requests elsewhere, in any order. Retries requests whose workers are lost; never raises because of a bad candidate."""

    def submit(self, request: EvaluationRequest) -> None:
        """Queue a request."""
        ...

    def next_done(self, timeout_s: float) -> Evaluation | LostWorker | None:
        """The next finished evaluation or lost worker; None if there is none within `timeout_s`."""
        ...

    def withdraw(self) -> Sequence[EvaluationRequest]:
        """Remove and return the requests that no worker has started."""
        ...


@dataclass(frozen=True, slots=True)
class Baseline:
    """A recipe that the search is compared with; `values` are its unit coordinates if it lies in the space."""

    id: str
    recipe: Mapping[str, Json] | None
    values: tuple[float, ...] | None


Observer = Callable[[RunState, Evaluation], None]
"""called after every recorded evaluation"""


class Interrupted(Exception):  # noqa: N818  (like KeyboardInterrupt, not an error)
    """The user asked to stop; every finished evaluation is recorded."""


class StopRequest:
    """Set by signal handlers. `drain`: propose nothing more and wait for running evaluations. `now`: leave at the next poll."""

    def __init__(self) -> None:
        self.drain = False
        self.now = False


class SearchLoop:
    """The loop of one run.

    Args:
        strategy: a new strategy, made with the run's seed; its past asks and tells are replayed from the journal.
        pool: evaluates candidates.
        recorder: the run's records.
        make_recipe: candidate -> recipe as JSON (None for the synthetic evaluation); may note its own events.
        baselines: evaluated before the first ask.
        budget: when to stop asking.
        in_flight: how many proposals may be pending; a function if workers join and leave.
        deterministic: tell results in the order of asking, whatever order they arrive in.
        observers: called after every evaluation, once it is durable.
        on_pause: called when no results are waiting.
        check: called before a proposal is recorded; raises if it is invalid.
        stop: set by signal handlers.
    """

    def __init__(
        self,
        *,
        strategy: Strategy,
        pool: WorkerPool,
        recorder: RunRecorder,
        make_recipe: Callable[[Candidate], Mapping[str, Json] | None],
        baselines: Sequence[Baseline],
        budget: Budget,
        in_flight: int | Callable[[], int],
        deterministic: bool,
        observers: Sequence[Observer] = (),
        on_pause: Callable[[RunState], None] = lambda state: None,
        check: Callable[[Candidate], None] = lambda candidate: None,
        stop: StopRequest | None = None,
    ) -> None:
        self._strategy, self._pool, self._recorder = strategy, pool, recorder
        self._make_recipe, self._baselines, self._budget = make_recipe, tuple(baselines), budget
        self._in_flight: Callable[[], int] = in_flight if callable(in_flight) else lambda: in_flight
        self._deterministic = deterministic
        self._observers, self._on_pause, self._check = tuple(observers), on_pause, check
        self._stop = stop or StopRequest()
        self._started = time.monotonic()
        self._elapsed_before = recorder.state.elapsed_s
        self._submitted: set[tuple[str, Split]] = set()
        self._arrived: dict[str, Evaluation] = {}
        """results that the strategy has not been told yet, in the order of arrival"""
        self._held: list[Entry] = []
        self._held_since = 0.0
        self._has_warned_of_stop = False

    @property
    def state(self) -> RunState:
        """The state of the run."""
        return self._recorder.state

    @property
    def elapsed_s(self) -> float:
        """Wall time over all sessions of the run."""
        return self._elapsed_before + time.monotonic() - self._started

    def run(self) -> RunState:
        """Evaluate the baselines, then search until the budget or the strategy ends it.

        Raises:
            Interrupted: a stop was requested; the run can be resumed.
            EvaluationError: every baseline failed.
            JournalError: the records cannot be written, or belong to another strategy.
        """
        self._restore_strategy()
        self._run_baselines()
        self._restore_pending()
        while True:
            # Ask before telling, so that a run that is killed between the two continues in the same order.
            asked = self._ask_while_free()
            if self._tell_next():
                continue
            self._release()
            if not self.state.pending:
                reasons = self._why_stop()
                if reasons or not asked:
                    reasons = reasons or {"strategy": "proposes nothing, and nothing is pending"}
                    if dict(self.state.stopped) != reasons:
                        self._recorder.record(events.stopped(reasons, self._strategy.diagnostics()))
                    return self.state
            self._wait()

    def evaluate_all(self, identifiers: Sequence[str], split: Split) -> None:
        """Evaluate the entries that have no result on `split` yet, and return when all have one.

        Raises:
            Interrupted: a stop was requested.
        """
        missing = [name for name in dict.fromkeys(identifiers) if (name, split) not in self.state.evaluations]
        queue = list(reversed(missing))
        while any((name, split) not in self.state.evaluations for name in missing):
            while queue and len(self._submitted) < self._in_flight() and not self._stop.drain:
                self._submit([self.state.entries[queue.pop()]], split)
            self._wait()

    def retry_if_all_failed(self, identifiers: Sequence[str], split: Split) -> None:
        """Withdraw the existing results of `identifiers` on `split` if all of them failed, since the cause may have been fixed since."""
        evaluated = [name for name in dict.fromkeys(identifiers) if (name, split) in self.state.evaluations]
        if evaluated and all(self.state.evaluations.status(name, split) is Status.FAILED for name in evaluated):
            self._recorder.record(events.retry(evaluated, split))

    def _restore_strategy(self) -> None:
        """Replay the recorded seeds, asks and tells. If an ask has another result now, the recorded one is used."""
        n_asked, others = 0, list[str]()
        for record in self._recorder.events():
            if self._stop.now:
                raise Interrupted
            if record["event"] == "seeded":
                self._seed_strategy(record["ids"])
            elif record["event"] == "told":
                self._strategy.tell([self._recorder.evaluation(name) for name in record["ids"]])
            elif record["event"] == "asked":
                n_asked += 1
                if not self._strategy.repeat(self.state.entries[record["id"]].candidate()):
                    others.append(record["id"])
        if others:
            logger.warning(
                "%d of the %d recorded proposals, the first being %s, cannot be reproduced here, e.g. because of another processor or other versions of "
                "evomerge or its libraries. The search continues from them as they were evaluated; its next proposals may differ from those of the "
                "original machine",
                len(others),
                n_asked,
                others[0],
            )

    def _run_baselines(self) -> None:
        known = self.state.entries
        new = [baseline for baseline in self._baselines if baseline.id not in known]
        if new:
            self._recorder.record(*(events.baseline(baseline.id, baseline.recipe, baseline.values) for baseline in new))
        names = [entry.id for entry in self.state.baselines]
        self.retry_if_all_failed(names, Split.SEARCH)
        self.evaluate_all(names, Split.SEARCH)
        results = [self.state.evaluations[name, Split.SEARCH] for name in names]
        if results and not any(result.status is Status.OK for result in results):
            raise EvaluationError(
                f"every baseline failed, so other candidates would fail too; the first error: {results[0].error}\nFix the cause and resume the "
                "run to evaluate them again"
            )
        if not self.state.seeded:
            inside = [name for name in names if known[name].genome is not None]
            self._recorder.record(events.seeded(inside))
            self._seed_strategy(inside)

    def _seed_strategy(self, identifiers: Sequence[str]) -> None:
        usable = [name for name in identifiers if self.state.evaluations[name, Split.SEARCH].status is Status.OK]
        self._strategy.seed(
            [self.state.entries[name].candidate() for name in usable],
            [self._recorder.evaluation(name) for name in usable],
        )

    def _restore_pending(self) -> None:
        """After a crash, resubmit unfinished evaluations, and queue finished ones that the strategy has not been told."""
        for entry in self.state.pending.values():
            if (entry.id, Split.SEARCH) in self.state.evaluations:
                self._arrived[entry.id] = self._recorder.evaluation(entry.id)
            elif not self._stop.drain:
                self._submit([entry], Split.SEARCH)

    def _ask_while_free(self) -> bool:
        """Ask until the workers are busy; False if the strategy had nothing to propose."""
        while len(self.state.pending) < self._in_flight() and not self._stop.drain:
            started = time.perf_counter()
            # timed as part of the proposal, since a strategy may do work for it when asked whether to stop
            if self._why_stop():
                break
            proposals = self._strategy.ask(1)
            if not proposals:
                return False
            candidate = proposals[0]
            self._check(candidate)
            self._recorder.note(events.asked(candidate, time.perf_counter() - started))
            self._held_since = self._held_since if self._held else started
            self._held.append(self.state.pending[candidate.id])
            if time.perf_counter() - self._held_since > HOLD_S:
                self._release()
        return True

    def _release(self) -> None:
        """Make noted events durable, and submit the proposals that were held back for that."""
        self._submit(self._held, Split.SEARCH)
        self._held.clear()

    def _why_stop(self) -> dict[str, Json]:
        return {**self._budget.reasons_to_stop(self.state, self.elapsed_s), **self._strategy.stop_reasons()}

    def _submit(self, entries: Sequence[Entry], split: Split) -> None:
        """Submit `entries` to the pool once all noted events are durable, including those of `make_recipe`."""
        requests = [self._request(entry, split) for entry in entries if (entry.id, split) not in self._submitted]
        self._recorder.commit()
        for request in requests:
            self._pool.submit(request)
            self._submitted.add((request.candidate_id, split))

    def _request(self, entry: Entry, split: Split) -> EvaluationRequest:
        recipe = entry.recipe
        if recipe is None and entry.genome is not None:
            recipe = self._make_recipe(entry.candidate())
        return EvaluationRequest(
            entry.id, split, recipe, entry.values, self.state.n_lost_workers.get((entry.id, split), 0)
        )

    def _wait(self) -> None:
        """Record the results that have arrived, or wait up to `POLL_S` for some.

        A signal to leave at once has often reached the workers too. Failures and lost workers after it are not the fault of the candidates and are
        not recorded, so these are evaluated again when the run is resumed.

        Raises:
            Interrupted: a stop was requested, and no running evaluations are left to wait for.
        """
        if self._stop.drain:
            self._submitted -= {(request.candidate_id, request.split) for request in self._pool.withdraw()}
        if self._stop.now or (self._stop.drain and not self._submitted):
            raise Interrupted
        if self._stop.drain and not self._has_warned_of_stop:
            self._has_warned_of_stop = True
            logger.warning(
                "stopping after the running evaluations (%d); press Ctrl-C again to stop at once", len(self._submitted)
            )
        answer = self._pool.next_done(POLL_S)
        if answer is None:
            self._on_pause(self.state)
            return
        group: list[Evaluation] = []
        lost: list[LostWorker] = []
        while answer is not None:
            if isinstance(answer, LostWorker):
                if not self._stop.now:
                    self._recorder.note(events.lost(answer))
                    lost.append(answer)
            elif answer.status is not Status.FAILED or not self._stop.now:
                evaluation = _only_numbers(answer)
                self._submitted.discard((evaluation.candidate_id, evaluation.split))
                self._recorder.note_evaluation(evaluation, self.elapsed_s)
                group.append(evaluation)
            answer = self._pool.next_done(0.0) if len(group) < MAX_GROUP else None
        self._recorder.commit()
        for loss in lost:
            logger.warning("%s on %s lost its worker: %s", loss.candidate_id, loss.split, loss.reason)
        for evaluation in group:
            self._announce(evaluation)

    def _announce(self, evaluation: Evaluation) -> None:
        """Pass a durable evaluation on to the strategy's queue and the observers."""
        if evaluation.status is Status.FAILED:
            logger.warning("%s failed on %s: %s", evaluation.candidate_id, evaluation.split, evaluation.error)
        if evaluation.candidate_id in self.state.pending and evaluation.split is Split.SEARCH:
            self._arrived[evaluation.candidate_id] = evaluation
        for observer in self._observers:
            observer(self.state, evaluation)

    def _tell_next(self) -> bool:
        """Tell one result: the oldest candidate's (`deterministic`), or the next that arrived. False if there is none."""
        # While draining, a deterministic run asks nothing more, so telling now would put results before proposals that must not depend on
        # them; the resumed run tells them.
        name = next(iter(self.state.pending if self._deterministic else self._arrived), None)
        if name not in self._arrived or (self._deterministic and self._stop.drain):
            return False
        evaluation = self._arrived.pop(name)
        self._recorder.note(events.told([name]))
        self._strategy.tell([evaluation])
        return True


def _only_numbers(evaluation: Evaluation) -> Evaluation:
    """`evaluation`, or a failed one if a score, standard error or cost is NaN or infinite, since that can be neither compared nor recorded."""
    parts = {"score": evaluation.scores, "standard error": evaluation.stderr, "cost": evaluation.cost}
    wrong = [
        f"the {kind} of {name} is {value}"
        for kind, part in parts.items()
        for name, value in part.items()
        if not math.isfinite(value)
    ]
    if not wrong:
        return evaluation
    cost = {name: value for name, value in evaluation.cost.items() if math.isfinite(value)}
    error = "; ".join(filter(None, [evaluation.error, *wrong]))
    return Evaluation(evaluation.candidate_id, evaluation.split, Status.FAILED, cost=cost, error=error)
