"""Which evaluations of a run are better than others: the mean that users see, the front, the best, and what a user picks."""

from collections.abc import Sequence

from evomerge.archive import Front, knees
from evomerge.core import Direction, Evaluation, JournalError, Objective, Split, Status, weights_in_mean
from evomerge.search.state import RunState
from evomerge.search.tables import Entry
from evomerge.strategy import candidate_id


def utility(objectives: Sequence[Objective], evaluation: Evaluation) -> float:
    """Mean of the objectives, weighted as `weights_in_mean` says, the minimised ones negated; higher is better."""
    weights = weights_in_mean(objectives)
    pairs = [(item, weight) for item, weight in zip(objectives, weights, strict=True) if weight]
    return sum(weight * item.sign * evaluation.value(item.name) for item, weight in pairs) / sum(weights)


def standing(objectives: Sequence[Objective], evaluation: Evaluation) -> tuple[float, ...]:
    """`utility`, and where that is equal the costs one after the other; higher is better. What dominates another stands higher."""
    costs = [objective for objective in objectives if objective.is_cost]
    return utility(objectives, evaluation), *(item.sign * evaluation.value(item.name) for item in costs)


def best_key(state: RunState, evaluation: Evaluation) -> tuple[tuple[float, ...], int]:
    """What the best has most of, whatever order results come in: its `standing`, and of equals it was asked first."""
    return standing(state.objectives, evaluation), -state.entries.position(evaluation.candidate_id)


def leader(state: RunState) -> str | None:
    """The id of the winner of the finals, or of the best on the search split while there have been none; None before a result."""
    if state.best_id is not None:
        return state.best_id
    best = max(state.evaluated(), key=lambda item: best_key(state, item), default=None)
    return None if best is None else best.candidate_id


def front_of(state: RunState) -> Front:
    """The candidates whose evaluations on the search split no other one dominates, baselines included.

    Raises:
        JournalError: the run has not begun.
    """
    if not state.run:
        raise JournalError("this run is still starting, or was stopped while it did: nothing has been evaluated yet")
    front = Front(state.objectives)
    for evaluation in state.evaluated():
        front.add(evaluation)
    return front


def members_of(state: RunState, front: Front) -> list[Evaluation]:
    """The evaluations of a front's members on the search split, without item scores, sorted by id."""
    return [state.evaluations[name, Split.SEARCH] for name in front.ids]


def best_of_front(state: RunState) -> list[Evaluation]:
    """The members of the front, the best first."""
    return sorted(members_of(state, front_of(state)), key=lambda item: best_key(state, item), reverse=True)


def reference_losses(state: RunState) -> list[float] | None:
    """The hypervolume's reference point as losses (m,): configured, else score 0 for maximised tasks and the worst baseline for the rest.

    None while one of the rest has no baseline.
    """
    losses = []
    for objective in state.objectives:
        if objective.reference is not None:
            losses.append(-objective.sign * objective.reference)
        elif objective.direction is Direction.MAXIMIZE and not objective.is_cost:
            losses.append(0.0)
        else:
            known = [
                -objective.sign * state.evaluations[entry.id, Split.SEARCH].value(objective.name)
                for entry in state.baselines
                if state.evaluations.status(entry.id, Split.SEARCH) is Status.OK
            ]
            if not known:
                return None
            losses.append(max(known))
    return losses


def pick(state: RunState, choice: str) -> Entry:
    """The entry a user means by `best`, `knee`, or an id with or without `id:` before it.

    `best` is the winner of the finals, or of the search split while there have been none; `knee` is the best of the front's `knees`, which where it
    has none are its ends; `id:42` means `id:c000042`.

    Raises:
        JournalError: nothing has been evaluated, or there is no such candidate.
    """
    if choice not in ("best", "knee"):
        wanted = choice.removeprefix("id:")
        name = candidate_id(int(wanted)) if wanted.isdecimal() else wanted
        if name not in state.entries:
            raise JournalError(
                f"no candidate {name!r} in this run; expected best, knee or an id (`evomerge front` lists the best)"
            )
        return state.entries[name]
    best = leader(state)
    if best is None:
        raise JournalError("no candidate of this run has been evaluated yet")
    if choice == "knee":
        best = max(knees(front_of(state)), key=lambda name: best_key(state, state.evaluations[name, Split.SEARCH]))
    return state.entries[best]
