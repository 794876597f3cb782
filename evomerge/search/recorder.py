"""`RunRecorder`: the one writer of a run. Journal, item store and `RunState` move together: durable first, then known."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evomerge.core import Evaluation, JournalError, Json, Split, Status
from evomerge.search.item_store import ItemStore
from evomerge.search.journal import Journal, event
from evomerge.search.run_directory import RunDirectory
from evomerge.search.state import RunState


class RunRecorder:
    """Opens (or creates) the records of a run and replays them.

    Raises:
        JournalError: they are damaged.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._journal = Journal(directory.journal)
        self.events: tuple[Mapping[str, Any], ...] = tuple(self._journal.replay())
        self.state = RunState.of(self.events)
        self._items = open_items(directory, self.state)
        for split in self.state.layouts:
            self._items.trim(split, sum(1 for _, other in self.state.item_rows if other is split))

    def record(self, *events: Mapping[str, Json]) -> None:
        """Makes `events` durable, then applies them to the state."""
        self._journal.append(*events)
        for record in events:
            self.state.apply(record)

    def record_evaluation(self, evaluation: Evaluation, elapsed_s: float) -> None:
        """Makes an evaluation with its item scores durable, then applies it.

        Raises:
            JournalError: it was recorded before, or its items do not match the run's.
        """
        split = evaluation.split
        if (evaluation.candidate_id, split) in self.state.evaluations:
            raise JournalError(f"{evaluation.candidate_id} has already been evaluated on {split}")
        row, checksum = None, None
        if evaluation.status is Status.OK and evaluation.item_scores:
            if split not in self.state.layouts:
                layout = tuple((task, len(scores)) for task, scores in evaluation.item_scores.items())
                self._items.declare(split, layout)
                self.record(event("items", split=split.value, layout=[list(column) for column in layout]))
            row, checksum = self._items.append(split, evaluation.item_scores)
        self.record(
            event(
                "evaluated",
                id=evaluation.candidate_id,
                split=split.value,
                status=evaluation.status.value,
                scores=dict(evaluation.scores),
                stderr=dict(evaluation.stderr),
                cost=dict(evaluation.cost),
                error=evaluation.error,
                row=row,
                checksum=checksum,
                elapsed_s=round(elapsed_s, 3),
            )
        )

    def evaluation(self, identifier: str, split: Split = Split.SEARCH) -> Evaluation:
        """A recorded evaluation with its item scores."""
        return with_items(self.state, self._items, identifier, split)

    def close(self) -> None:
        """Closes the files."""
        self._journal.close()
        self._items.close()


def open_items(directory: RunDirectory, state: RunState) -> ItemStore:
    """The item store of a run, with the columns that `state` knows."""
    store = ItemStore(directory.folder)
    for split, layout in state.layouts.items():
        store.declare(split, layout)
    return store


def with_items(state: RunState, store: ItemStore, identifier: str, split: Split) -> Evaluation:
    """The evaluation of `identifier` on `split`, its item scores read from `store`."""
    evaluation = state.evaluations[identifier, split]
    place = state.item_rows.get((identifier, split))
    return evaluation if place is None else replace(evaluation, item_scores=store.read(split, *place))
