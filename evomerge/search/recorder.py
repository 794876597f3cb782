"""`RunRecorder`: the one writer of a run. Journal, item store and `RunState` move together.

`note` is for what nobody outside has to know yet: the state has it at once, the disk with the next `commit`. Nothing may leave the
process (a request, a file, a line on the screen) before it is committed. `record` is both.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from evomerge.core import Evaluation, JournalError, Json, Split, Status
from evomerge.search.item_store import ItemStore
from evomerge.search.journal import Journal, event
from evomerge.search.run_directory import RunDirectory
from evomerge.search.state import RunState


class RunRecorder:
    """Opens (or creates) the records of a run and replays them.

    Args:
        directory: the run.
        guard: called before anything is written; raises where this process no longer owns the run.

    Raises:
        JournalError: they are damaged, or cannot be written to.
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
        """The events that were there when the records were opened, in order; read from the file each time."""
        return self._journal.replay()

    def record(self, *events: Mapping[str, Json]) -> None:
        """`note` and `commit`."""
        self.note(*events)
        self.commit()

    def note(self, *events: Mapping[str, Json]) -> None:
        """Applies `events` to the state; they are durable after the next `commit`.

        Raises:
            JournalError: one contradicts those before it, or is too large to be read again.
        """
        self._journal.write(*events)
        for record in events:
            self.state.apply(record)

    def commit(self) -> None:
        """Returns when everything noted is durable: item scores first, then the events that name them.

        Raises:
            JournalError: the disk is full, the files are not writable any more, or another process has taken the run over.
        """
        self._guard()
        self._items.commit()
        self._journal.commit()

    def note_evaluation(self, evaluation: Evaluation, elapsed_s: float) -> None:
        """Takes an evaluation with its item scores in; it is durable after the next `commit`.

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
                sizes: dict[str, Json] = {name: list(sizes) for name, sizes in evaluation.sample_sizes.items()}
                self.note(
                    event(
                        "items",
                        split=split.value,
                        layout=[list(column) for column in layout],
                        **({"sample_sizes": sizes} if sizes else {}),
                    )
                )
            row, checksum = self._items.write(split, evaluation.item_scores)
        self.note(
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
    place = state.evaluations.place(identifier, split)
    if place is None:
        return evaluation
    return replace(evaluation, item_scores=store.read(split, *place), sample_sizes=state.sample_sizes[split])
