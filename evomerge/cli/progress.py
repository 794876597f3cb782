"""Progress of a search on the terminal: a line for every improvement, status lines in between, and a table at the end."""

import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.archive import Front
from evomerge.cli.console import number, say
from evomerge.cli.interrupts import EXIT_INTERRUPTED, ignore_interrupts
from evomerge.core import EngineError, Evaluation, EvomergeError, Split, Status
from evomerge.search import Interrupted, RunDirectory, RunState, front_of, in_finals, indifferent, standing

STATUS_EVERY_S = 10.0
"""How often a status line is printed while nothing improves."""

WAITING_AFTER_S = 5.0
"""If there is no result by then, the user is told what is being waited for: engines take seconds to minutes to start."""


class Progress:
    """An observer that prints the progress of a search.

    Args:
        folder: the run directory.
        n_evaluations: the budget, if there is one.
        n_finalists: how many candidates the finals rank; 0 = no finals.
        known: the state of the run so far, if it is resumed.
    """

    def __init__(
        self, folder: Path, n_evaluations: int | None, n_finalists: int = 0, known: RunState | None = None
    ) -> None:
        self._folder, self._budget, self._n_finalists = folder, n_evaluations, n_finalists
        before = [] if known is None else [standing(known.objectives, done) for done in known.evaluated()]
        self._best = max(before, default=(float("-inf"),))
        self._front = front_of(known) if before and known is not None else None
        self._started = self._last = time.monotonic()
        self._n_here = 0
        self._seen: set[tuple[str, Split]] = set() if known is None else set(known.evaluations)
        self._has_announced_finals = False
        self._splits_with_drops_noted: set[Split] = set()
        self.waiting = threading.Timer(
            WAITING_AFTER_S, say, ["waiting for the first result; engines take a while to start"]
        )
        self.waiting.daemon = True

    def __call__(self, state: RunState, evaluation: Evaluation) -> None:
        """Print what a finished evaluation changes."""
        self.waiting.cancel()
        self._n_here += 1
        self._seen.add((evaluation.candidate_id, evaluation.split))
        self._show(state, evaluation)
        if self._n_finalists and self._budget and evaluation.split is Split.SEARCH:
            self._announce_finals(state, self._budget)

    @property
    def has_results(self) -> bool:
        """Whether anything has been evaluated, here or in an earlier session."""
        return bool(self._seen)

    def _show(self, state: RunState, evaluation: Evaluation) -> None:
        entry = state.entries[evaluation.candidate_id]
        if evaluation.status is not Status.OK:
            return  # the loop has already logged a warning
        n_dropped = evaluation.cost.get("dropped_items")
        if n_dropped and evaluation.split not in self._splits_with_drops_noted:
            self._splits_with_drops_noted.add(evaluation.split)
            say(
                f"note: {n_dropped:.0f} {evaluation.split} items also appear in a later split and were dropped (drop_shared)"
            )
        if evaluation.split is Split.SEARCH:
            self._front = Front(state.objectives) if self._front is None else self._front
            self._front.add(evaluation)
        here = standing(state.objectives, evaluation)
        scores = "  ".join(
            f"{objective.name} {number(evaluation.value(objective.name), 3)}" for objective in state.objectives
        )
        line = f"{evaluation.candidate_id:<22} mean {number(here[0], 3)}   {scores}"
        if evaluation.split is not Split.SEARCH:
            names = in_finals(state, evaluation.split)
            # not counted from the state, which may be ahead: results that arrive together are recorded together
            n_done = sum((name, evaluation.split) in self._seen for name in names)
            say(f"[{evaluation.split} {n_done}/{len(names)}] {line}")
        elif entry.baseline:
            self._print(state, line)
            self._best = max(self._best, here)
            if all((baseline.id, Split.SEARCH) in self._seen for baseline in state.baselines):
                self._note_uniform_scores(state)
        elif here > self._best:
            self._best = here
            self._print(state, f"{line}   best so far")
        elif time.monotonic() - self._last > STATUS_EVERY_S:
            rate = self._n_here / (time.monotonic() - self._started)
            self._print(
                state, f"{line}   ({60 * rate:.0f}/min, best {number(self._best[0], 3)}{self._size_of_front(state)})"
            )

    def _announce_finals(self, state: RunState, budget: int) -> None:
        if state.n_evaluations[Split.SEARCH] == len(state.entries) >= budget and not self._has_announced_finals:
            self._has_announced_finals = True
            say(
                f"search done{self._size_of_front(state)}; finals: the {self._n_finalists} finalists and all baselines are scored on select, then the winner and all baselines on report"
            )

    def _size_of_front(self, state: RunState) -> str:
        return f", front of {len(self._front)}" if self._front is not None and len(state.objectives) > 1 else ""

    def _note_uniform_scores(self, state: RunState) -> None:
        same = [f"{name} ({number(score, 3)})" for name, score in indifferent(state).items()]
        if same:
            say(
                f"note: every baseline has the same score on {', '.join(same)}, so the search may learn nothing from it. To see what models "
                f"answer: evomerge eval MODEL -c {shlex.quote(str(self._folder))} --split search --show 3"
            )

    def _print(self, state: RunState, text: str) -> None:
        self._last = time.monotonic()
        count = state.n_evaluations[Split.SEARCH]
        total = f"/{self._budget}" if self._budget else ""
        say(f"[{count}{total}] {text}")


def _how_to_continue(directory: RunDirectory, has_results: bool) -> str:
    if has_results:
        return f"Every finished evaluation is saved. Once the problem is fixed, continue with:\n  {directory.resume_command}"
    return (
        f"Nothing has been evaluated yet. Once the problem is fixed:\n  {directory.resume_command}\n"
        f"or, if it is in the configuration, start the search again with --run-dir {shlex.quote(str(directory.folder))}"
    )


@contextmanager
def watched(
    folder: Path, n_evaluations: int | None, n_finalists: int = 0, known: RunState | None = None
) -> Iterator[Callable[[RunState, Evaluation], None]]:
    """Print the run directory, the progress, and at the end the summary or how to continue."""
    from evomerge.build import open_run
    from evomerge.cli.tables import print_summary

    directory = RunDirectory(folder)
    say(f"run directory: {folder}")
    progress = Progress(folder, n_evaluations, n_finalists, known)
    progress.waiting.start()
    try:
        yield progress
    except Interrupted:
        ignore_interrupts()  # everything is saved: another Ctrl-C must not make this look like a failure
        say(f"\ninterrupted; every finished evaluation is saved. To continue:\n  {directory.resume_command}")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        says_what_to_do = isinstance(error, EvomergeError) and not isinstance(error, EngineError)
        if directory.exists and not says_what_to_do:
            error.add_note(f"{_how_to_continue(directory, progress.has_results)}\nWorker logs: {directory.logs}")
        raise
    finally:
        progress.waiting.cancel()
    print_summary(open_run(folder))
