"""`RunState`: the state of a run, rebuilt from its events. The loop, the reports and the exports all read this one state.

Applying an event takes constant time, and a candidate takes a few hundred bytes (see `tables`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from evomerge.core import (
    Evaluation,
    Genome,
    JournalError,
    Json,
    Objective,
    Split,
    Status,
    genome_from_json,
)
from evomerge.search.tables import Entry, EntryTable, EvaluationTable


@dataclass(repr=False)
class RunState:
    """The state after a sequence of events.

    Attributes:
        run: the `run` event.
        objectives: the run's objectives.
        entries: every candidate by id, in the order of their events.
        evaluations: (id, split) -> evaluation, without item scores; `evaluations.place` tells where those are.
        layouts: split -> columns of the item store.
        sample_sizes: split -> name of a group of tasks -> number of items of each of its tasks.
        pending: candidates asked but not yet told, in the order they were asked.
        n_evaluations: number of evaluations of each split, including failed ones.
        n_lost_workers: (id, split) -> number of workers lost while evaluating it, as long as it has no evaluation.
        items_told: total number of items of the baselines and the told candidates, search split.
        items_each: the largest number of items among these.
        failed_in_a_row: how many of the last told candidates failed in a row, in this session.
        last_error: why the last of those failed.
        seeded: whether the strategy has been given the baselines.
        stopped: reasons of the last stop; empty while the search is running.
        diagnostics: the strategy's diagnostics at the last stop.
        finalists: ids ranked on `select`.
        best_id: the winner of the finals.
        search_continued: whether candidates have been asked since those finals.
        finished: whether the finals are done.
        elapsed_s: wall time over all sessions up to the last evaluation.
        ask_s: total time that the strategy took to propose candidates.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    objectives: tuple[Objective, ...] = ()
    entries: EntryTable = field(default_factory=EntryTable)
    evaluations: EvaluationTable = field(default_factory=EvaluationTable)
    layouts: dict[Split, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    sample_sizes: dict[Split, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    pending: dict[str, Entry] = field(default_factory=dict)
    n_evaluations: Counter[Split] = field(default_factory=Counter)
    n_lost_workers: Counter[tuple[str, Split]] = field(default_factory=Counter)
    items_told: float = 0.0
    items_each: float = 0.0
    failed_in_a_row: int = 0
    last_error: str | None = None
    seeded: bool = False
    stopped: Mapping[str, Json] = field(default_factory=dict)
    diagnostics: Mapping[str, Json] = field(default_factory=dict)
    finalists: tuple[str, ...] = ()
    best_id: str | None = None
    search_continued: bool = False
    finished: bool = False
    elapsed_s: float = 0.0
    ask_s: float = 0.0

    def __repr__(self) -> str:
        return f"RunState({self.n_evaluations[Split.SEARCH]} evaluations, {'finished' if self.finished else 'not finished'})"

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> "RunState":
        """The state after `events`.

        Raises:
            JournalError: an event is of an unknown kind, or contradicts those before it.
        """
        state = cls()
        for event in events:
            state.apply(event)
        return state

    def apply(self, event: Mapping[str, Any]) -> None:
        """Apply one event. Raises JournalError like `of`."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is None:
            raise JournalError(
                f"record {event.get('seq')}: unknown event {event['event']!r}; the journal is from a newer evomerge"
            )
        handler(event)

    @property
    def proposed(self) -> list[Entry]:
        """The strategy's candidates, in the order they were asked."""
        return [entry for entry in self.entries.values() if not entry.baseline]

    @property
    def n_proposed(self) -> int:
        """How many candidates the strategy has proposed."""
        return len(self.entries) - self.entries.n_baselines

    @property
    def baselines(self) -> list[Entry]:
        """The baselines, in the order they were declared."""
        return self.entries.baselines()

    def evaluated(self) -> Iterator[Evaluation]:
        """OK evaluations of the search split, in the order of the entries."""
        for identifier in self.entries:
            if self.evaluations.status(identifier, Split.SEARCH) is Status.OK:
                yield self.evaluations[identifier, Split.SEARCH]

    def _on_run(self, event: Mapping[str, Any]) -> None:
        if self.run:
            raise JournalError("the journal has two `run` records")
        self.run = event
        self.objectives = tuple(map(Objective.from_json, event["objectives"]))

    def _on_session(self, event: Mapping[str, Any]) -> None:
        self.failed_in_a_row = 0  # assume that the cause of failures was fixed before the run was resumed

    def _on_baseline(self, event: Mapping[str, Any]) -> None:
        self.entries.add(Entry(event["id"], _genome(event), recipe=event["recipe"], baseline=True))

    def _on_seeded(self, event: Mapping[str, Any]) -> None:
        self.seeded = True

    def _on_asked(self, event: Mapping[str, Any]) -> None:
        entry = Entry(event["id"], _genome(event), tuple(event["parents"]))
        self.entries.add(entry)
        self.pending[entry.id] = entry
        self.ask_s += event["ask_s"]
        self.stopped, self.finished = {}, False
        self.search_continued = self.best_id is not None

    def _on_crossed(self, event: Mapping[str, Any]) -> None:
        self.entries.add_factors(event["id"], event["factors"])

    def _on_items(self, event: Mapping[str, Any]) -> None:
        split = Split(event["split"])
        self.layouts[split] = tuple((task, count) for task, count in event["layout"])
        self.sample_sizes[split] = {name: tuple(sizes) for name, sizes in event.get("sample_sizes", {}).items()}

    def _on_lost(self, event: Mapping[str, Any]) -> None:
        self.n_lost_workers[event["id"], Split(event["split"])] += 1

    def _on_evaluated(self, event: Mapping[str, Any]) -> None:
        split = Split(event["split"])
        if event["id"] not in self.entries or (event["id"], split) in self.evaluations:
            raise JournalError(
                f"record {event.get('seq')}: evaluation of {event['id']} on {split} is repeated or of an unknown candidate"
            )
        evaluation = Evaluation(
            candidate_id=self.entries.name(event["id"]),
            split=split,
            status=Status(event["status"]),
            scores=event["scores"],
            stderr=event["stderr"],
            cost=event["cost"],
            error=event["error"],
        )
        self.evaluations.add(evaluation, None if event["row"] is None else (event["row"], event["checksum"]))
        self.n_lost_workers.pop((evaluation.candidate_id, split), None)
        self.elapsed_s = max(self.elapsed_s, event["elapsed_s"])
        self.n_evaluations[split] += 1
        if split is Split.SEARCH and self.entries.is_baseline(evaluation.candidate_id):
            self._count_items(evaluation)

    def _on_retry(self, event: Mapping[str, Any]) -> None:
        split = Split(event["split"])
        for name in event["ids"]:
            if self.evaluations.status(name, split) is not Status.FAILED:
                raise JournalError(f"record {event.get('seq')}: {name} is retried on {split} but has not failed there")
            self.evaluations.drop(name, split)
            self.n_evaluations[split] -= 1
        self.finished = False

    def _on_told(self, event: Mapping[str, Any]) -> None:
        for name in event["ids"]:
            if name not in self.pending or (name, Split.SEARCH) not in self.evaluations:
                raise JournalError(f"record {event.get('seq')}: {name} is told without having been asked and evaluated")
            del self.pending[name]
            evaluation = self.evaluations[name, Split.SEARCH]
            self._count_items(evaluation)
            failed = evaluation.status is Status.FAILED
            self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
            self.last_error = evaluation.error if failed else self.last_error

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        self.stopped = event["reasons"]
        self.diagnostics = event.get("diagnostics", {})

    def _on_finalists(self, event: Mapping[str, Any]) -> None:
        self.finalists, self.finished = tuple(event["ids"]), False

    def _on_best(self, event: Mapping[str, Any]) -> None:
        self.best_id, self.search_continued = event["id"], False

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.finished, self.search_continued = True, False

    def _count_items(self, evaluation: Evaluation) -> None:
        items = evaluation.cost.get("items", 0.0)
        self.items_told += items
        self.items_each = max(self.items_each, items)


def _genome(event: Mapping[str, Any]) -> Genome | None:
    """The genome in `values` (a point) or `crossover` (a child of two candidates); None if a baseline has neither."""
    data = event["values"] if event["values"] is not None else event.get("crossover")
    return None if data is None else genome_from_json(data)
