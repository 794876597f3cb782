"""`RunState`: what a run knows, rebuilt from its events. The loop, the reports and the exports all read this one picture."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evomerge.core import Candidate, Direction, Evaluation, JournalError, Json, Objective, Split, Status, VectorGenome


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate of the run.

    Attributes:
        id: unique in the run; baselines are called `source:<name>`, `uniform`, `task_arithmetic:<weight>`.
        values: unit coordinates (d,), None for a baseline outside the space.
        parents: ids it was made from.
        recipe: a baseline's recipe as JSON; None where it follows from `values`.
        baseline: whether it is a baseline.
    """

    id: str
    values: tuple[float, ...] | None
    parents: tuple[str, ...] = ()
    recipe: Mapping[str, Json] | None = None
    baseline: bool = False

    def candidate(self) -> Candidate:
        """As strategies know it.

        Raises:
            JournalError: it has no coordinates.
        """
        if self.values is None:
            raise JournalError(f"{self.id} is not a point of the search space")
        return Candidate(self.id, VectorGenome(self.values), self.parents)


@dataclass
class RunState:
    """The state after a sequence of events.

    Attributes:
        run: the `run` event.
        entries: every candidate by id, in the order of their events.
        evaluations: (id, split) -> evaluation, without item scores.
        item_rows: (id, split) -> (row, checksum) in the item store.
        layouts: split -> columns of the item store.
        pending: asked but not yet told, in the order they were asked.
        n_evaluations: evaluations of each split, however they ended.
        items_told: items of the baselines and of the candidates that the strategy has been told, search split.
        items_each: the most items one of those took.
        failed_in_a_row: how many of the last told candidates failed.
        seeded: whether the strategy has been given the baselines.
        stopped: reasons of the last stop; empty while the search is going on.
        finalists: ids ranked on `select`.
        best_id: the winner of the finals.
        finished: whether finals are done.
        elapsed_s: wall time of all sessions up to the last evaluation.
        ask_s: time the strategy took to propose, all candidates together.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    evaluations: dict[tuple[str, Split], Evaluation] = field(default_factory=dict)
    item_rows: dict[tuple[str, Split], tuple[int, str]] = field(default_factory=dict)
    layouts: dict[Split, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    pending: dict[str, Entry] = field(default_factory=dict)
    n_evaluations: Counter[Split] = field(default_factory=Counter)
    items_told: float = 0.0
    items_each: float = 0.0
    failed_in_a_row: int = 0
    seeded: bool = False
    stopped: Mapping[str, Json] = field(default_factory=dict)
    finalists: tuple[str, ...] = ()
    best_id: str | None = None
    finished: bool = False
    elapsed_s: float = 0.0
    ask_s: float = 0.0

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> "RunState":
        """The state after `events`.

        Raises:
            JournalError: an event of unknown kind, or one that contradicts those before it.
        """
        state = cls()
        for event in events:
            state.apply(event)
        return state

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes one event in. Raises JournalError as `of`."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is None:
            raise JournalError(
                f"record {event.get('seq')}: unknown event {event['event']!r}; the journal is from a newer evomerge"
            )
        handler(event)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The run's objectives."""
        return tuple(Objective(item["name"], Direction(item["direction"])) for item in self.run["objectives"])

    @property
    def proposed(self) -> list[Entry]:
        """The strategy's candidates, in the order they were asked."""
        return [entry for entry in self.entries.values() if not entry.baseline]

    @property
    def baselines(self) -> list[Entry]:
        """The baselines, in the order they were declared."""
        return [entry for entry in self.entries.values() if entry.baseline]

    def evaluated(self, split: Split = Split.SEARCH) -> list[Evaluation]:
        """OK evaluations of a split, in the order of the entries."""
        found = (self.evaluations.get((identifier, split)) for identifier in self.entries)
        return [evaluation for evaluation in found if evaluation is not None and evaluation.status is Status.OK]

    def _on_run(self, event: Mapping[str, Any]) -> None:
        if self.run:
            raise JournalError("the journal has two `run` records")
        self.run = event

    def _on_session(self, event: Mapping[str, Any]) -> None:
        """Sessions are noted for readers; they change nothing."""

    def _on_baseline(self, event: Mapping[str, Any]) -> None:
        self._add(Entry(event["id"], _values(event["values"]), recipe=event["recipe"], baseline=True))

    def _on_seeded(self, event: Mapping[str, Any]) -> None:
        self.seeded = True

    def _on_asked(self, event: Mapping[str, Any]) -> None:
        entry = Entry(event["id"], _values(event["values"]), tuple(event["parents"]))
        self._add(entry)
        self.pending[entry.id] = entry
        self.ask_s += event["ask_s"]
        self.stopped, self.finished = {}, False

    def _on_items(self, event: Mapping[str, Any]) -> None:
        self.layouts[Split(event["split"])] = tuple((task, count) for task, count in event["layout"])

    def _on_evaluated(self, event: Mapping[str, Any]) -> None:
        key = (event["id"], Split(event["split"]))
        if event["id"] not in self.entries or key in self.evaluations:
            raise JournalError(
                f"record {event.get('seq')}: evaluation of {key[0]} on {key[1]} is repeated or of an unknown candidate"
            )
        self.evaluations[key] = Evaluation(
            candidate_id=event["id"],
            split=key[1],
            status=Status(event["status"]),
            scores=event["scores"],
            stderr=event["stderr"],
            cost=event["cost"],
            error=event["error"],
        )
        if event["row"] is not None:
            self.item_rows[key] = (event["row"], event["checksum"])
        self.elapsed_s = max(self.elapsed_s, event["elapsed_s"])
        self.n_evaluations[key[1]] += 1
        if self.entries[key[0]].baseline and key[1] is Split.SEARCH:
            self._count_items(self.evaluations[key])

    def _on_told(self, event: Mapping[str, Any]) -> None:
        for name in event["ids"]:
            if name not in self.pending or (name, Split.SEARCH) not in self.evaluations:
                raise JournalError(f"record {event.get('seq')}: {name} is told without having been asked and evaluated")
            del self.pending[name]
            evaluation = self.evaluations[name, Split.SEARCH]
            self._count_items(evaluation)
            self.failed_in_a_row = self.failed_in_a_row + 1 if evaluation.status is Status.FAILED else 0

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        self.stopped = event["reasons"]

    def _on_finalists(self, event: Mapping[str, Any]) -> None:
        self.finalists = tuple(event["ids"])

    def _on_best(self, event: Mapping[str, Any]) -> None:
        self.best_id = event["id"]

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.finished = True

    def _count_items(self, evaluation: Evaluation) -> None:
        items = evaluation.cost.get("items", 0.0)
        self.items_told += items
        self.items_each = max(self.items_each, items)

    def _add(self, entry: Entry) -> None:
        if entry.id in self.entries:
            raise JournalError(f"candidate {entry.id} stands twice in the journal")
        self.entries[entry.id] = entry


def utility(objectives: Sequence[Objective], evaluation: Evaluation) -> float:
    """Mean of the maximised objectives minus the mean of the minimised ones that have the scale of a score; higher is better.

    Costs (`cost.*`) have other units and are left out unless they are all there is.
    """
    scores = [objective for objective in objectives if not objective.name.startswith("cost.")] or list(objectives)
    signs = [1.0 if objective.direction is Direction.MAXIMIZE else -1.0 for objective in scores]
    return float(
        np.mean([sign * evaluation.value(objective.name) for sign, objective in zip(signs, scores, strict=True)])
    )


def _values(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)
