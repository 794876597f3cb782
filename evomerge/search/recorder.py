"""`RunRecorder`: the only writer of a run, which keeps journal, item store and `RunState` consistent.

`note` updates the state at once, and the disk with the next `commit`. Nothing that depends on a noted event may leave the process (a request,
a file, a line on the screen) before the commit. `record` does both.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from evomerge.core import Evaluation, JournalError, Json, Split, Status
from evomerge.search import events
from evomerge.search.item_store import ItemStore
from evomerge.search.journal import Journal
from evomerge.search.run_directory import RunDirectory
from evomerge.search.state import RunState


class RunRecorder:
    """Opens (or creates) the records of a run and replays them.

    Args:
        directory: the run directory.
        guard: called before anything is written; raises if this process no longer owns the run.

    Raises:
        JournalError: the records are damaged, or cannot be written.
    """

    def __init__(self, directory: RunDirectory, guard: Callable[[], None] = lambda: None) -> None:
        self._guard = guard
        self.state = RunState()
        try:
            self._journal = Journal(directory.journal, self.state.apply)
        except OSError as problem:
            raise JournalError(f"{directory.journal}: cannot be opened for writing ({problem.strerror})") from None
        self._items = open_items(directory, self.state)
        try:
            for split in Split:
                self._items.trim(split, self.state.evaluations.n_item_rows(split))
        except JournalError:
            self.close()
            raise

    def events(self) -> Iterator[Mapping[str, Any]]:
        """The events that existed when the records were opened, in order; read from the file on each call."""
        return self._journal.replay()

    def record(self, *happened: Mapping[str, Json]) -> None:
        """`note` and `commit`."""
        self.note(*happened)
        self.commit()

    def note(self, *happened: Mapping[str, Json]) -> None:
        """Apply events to the state; they are durable after the next `commit`.

        Raises:
            JournalError: an event contradicts those before it, or exceeds the maximum size.
        """
        self._journal.write(*happened)
        for record in happened:
            self.state.apply(record)

    def commit(self) -> None:
        """Make everything noted durable: item scores first, then the events that refer to them.

        Raises:
            JournalError: the disk is full, the files are no longer writable, or another process has taken over the run.
        """
        self._guard()
        self._items.commit()
        self._journal.commit()

    def note_evaluation(self, evaluation: Evaluation, elapsed_s: float) -> None:
        """Note an evaluation with its item scores; it is durable after the next `commit`.

        Raises:
            JournalError: it has already been recorded, or its items do not match the run's.
        """
        split = evaluation.split
        if (evaluation.candidate_id, split) in self.state.evaluations:
            raise JournalError(f"{evaluation.candidate_id} has already been evaluated on {split}")
        place = None
        if evaluation.status is Status.OK and evaluation.item_scores:
            if split not in self.state.layouts:
                layout = tuple((task, len(scores)) for task, scores in evaluation.item_scores.items())
                self._items.declare(split, layout)
                self.note(events.items(split, layout, evaluation.sample_sizes))
            place = self._items.write(split, evaluation.item_scores)
        self.note(events.evaluated(evaluation, place, elapsed_s))

    def evaluation(self, identifier: str, split: Split = Split.SEARCH) -> Evaluation:
        """A recorded evaluation with its item scores."""
        return with_items(self.state, self._items, identifier, split)

    def close(self) -> None:
        """Close the files."""
        self._journal.close()
        self._items.close()


def open_items(directory: RunDirectory, state: RunState) -> ItemStore:
    """Open the item store of a run, with the columns in `state`."""
    store = ItemStore(directory.folder)
    for split, layout in state.layouts.items():
        store.declare(split, layout)
    return store


def with_items(state: RunState, store: ItemStore, identifier: str, split: Split) -> Evaluation:
    """The evaluation of `identifier` on `split`, with its item scores from `store`."""
    evaluation = state.evaluations[identifier, split]
    place = state.evaluations.place(identifier, split)
    if place is None:
        return evaluation
    return replace(evaluation, item_scores=store.read(split, *place), sample_sizes=state.sample_sizes[split])
