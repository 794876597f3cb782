"""Keeps `front.json`, `front.csv` and `best.yaml` up to date during a run; each is replaced atomically."""

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evomerge.archive import Front
from evomerge.core import (
    Evaluation,
    Json,
    Objective,
    Split,
    Status,
    atomic_write_json,
    atomic_write_text,
)
from evomerge.recipe import Recipe, write_recipe
from evomerge.search.ranking import best_key, front_of, leader, members_of, reference_losses
from evomerge.search.run_directory import RunDirectory, writing_into
from evomerge.search.state import RunState
from evomerge.search.tables import Entry

WRITE_EVERY_S = 1.0
"""While results keep arriving, the files are at most about this far behind the journal."""


def front_json(state: RunState, front: Front) -> dict[str, Json]:
    """The content of `front.json`: objectives, members sorted by id with scores and standard errors, hypervolume. No times, no paths."""
    reference = reference_losses(state)
    volume = None if reference is None else front.hypervolume(np.array(reference))
    names = [objective.name for objective in state.objectives]
    return {
        "objectives": [objective.to_json() for objective in state.objectives],
        "split": Split.SEARCH.value,
        "members": [_member(member, names) for member in members_of(state, front)],
        # may overflow if the reference is a failed merge with huge perplexities on several tasks
        "hypervolume": volume if volume is not None and np.isfinite(volume) else None,
    }


class FrontFiles:
    """An observer that rewrites the files when an evaluation changes them, at most once a second while results keep arriving.

    `best.yaml` is the recipe of the `leader`: the winner of finals stays until the next finals.

    The caller must call `flush` when no results are waiting, and at the end. The first flush also writes the results in `state`, since a
    killed process may have left the files behind the journal.

    Args:
        directory: the run directory.
        state: the state of the run so far.
        recipe_of: returns the recipe of an entry, or None if it has none (synthetic evaluation).
    """

    def __init__(self, directory: RunDirectory, state: RunState, recipe_of: Callable[[Entry], Recipe | None]) -> None:
        self._directory, self._recipe_of = directory, recipe_of
        self._front = front_of(state)
        self._best = max((best_key(state, evaluation) for evaluation in state.evaluated()), default=((-np.inf,), 0))
        self._front_changed, self._new_best = bool(self._front), leader(state)
        self._next_write = -np.inf

    def __call__(self, state: RunState, evaluation: Evaluation) -> None:
        """Add a new evaluation."""
        if evaluation.split is not Split.SEARCH or evaluation.status is not Status.OK:
            return
        if self._front.add(evaluation):
            self._front_changed = True
        key = best_key(state, evaluation)
        if key > self._best and state.best_id is None:
            self._best, self._new_best = key, evaluation.candidate_id
        if time.monotonic() >= self._next_write:
            self.flush(state)

    def flush(self, state: RunState) -> None:
        """Write the files that have changed.

        Raises:
            JournalError: the files cannot be written.
        """
        started = time.monotonic()
        if self._front_changed:
            self._write_front(state)
        if self._new_best is not None:
            self._write_best(state.entries[self._new_best])
        if self._front_changed or self._new_best is not None:
            # spend at most about a twentieth of the time writing, even with a slow disk or a large front
            self._next_write = time.monotonic() + max(WRITE_EVERY_S, 20 * (time.monotonic() - started))
        self._front_changed, self._new_best = False, None

    def finish(self, state: RunState) -> None:
        """Write all files at the end of a run; the best is the winner of the finals, if there were any.

        Raises:
            JournalError: see `flush`.
        """
        self._write_front(state)
        best = leader(state)
        if best is not None:
            self._write_best(state.entries[best])

    def _write_front(self, state: RunState) -> None:
        """`front.json` and `front.csv`."""
        content = front_json(state, self._front)
        with writing_into(self._directory):
            atomic_write_json(self._directory.front_json, content)
            atomic_write_text(self._directory.front_csv, front_csv(state.objectives, members_of(state, self._front)))

    def _write_best(self, entry: Entry) -> None:
        """`best.yaml`."""
        recipe = self._recipe_of(entry)
        if recipe is not None:
            with writing_into(self._directory):
                write_recipe(recipe, self._directory.best)


def front_csv(objectives: Sequence[Objective], members: Sequence[Evaluation]) -> str:
    """One line a member: id, scores, standard errors."""
    names = [objective.name for objective in objectives]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["id", *names, *(f"{name}_stderr" for name in names)])
    for member in members:
        row = [member.value(name) for name in names]
        writer.writerow([member.candidate_id, *row, *(member.stderr.get(name, "") for name in names)])
    return stream.getvalue()


def _member(evaluation: Evaluation, names: Sequence[str]) -> Mapping[str, Json]:
    return {
        "id": evaluation.candidate_id,
        "scores": {name: evaluation.value(name) for name in names},
        "stderr": {name: evaluation.stderr[name] for name in names if name in evaluation.stderr},
    }
