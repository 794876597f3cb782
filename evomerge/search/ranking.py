"""Ranks the evaluations of a run: the mean of the objectives, the front, the best candidate, and a user's pick."""

from collections.abc import Sequence

from evomerge.archive import Front, knees
from evomerge.core import Direction, Evaluation, JournalError, Objective, Split, Status, weights_in_mean
from evomerge.search.state import RunState
from evomerge.search.tables import Entry
from evomerge.strategy import candidate_id


def utility(objectives: Sequence[Objective], evaluation: Evaluation) -> float:
    """Mean of the objectives with the weights of `weights_in_mean`, minimised ones negated; higher is better."""
    weights = weights_in_mean(objectives)
    pairs = [(objective, weight) for objective, weight in zip(objectives, weights, strict=True) if weight]
    return sum(weight * goal.sign * evaluation.value(goal.name) for goal, weight in pairs) / sum(weights)


def standing(objectives: Sequence[Objective], evaluation: Evaluation) -> tuple[float, ...]:
    """A sort key: `utility`, ties broken by the costs in order; higher is better. An evaluation that dominates another has the higher key."""
    costs = [objective for objective in objectives if objective.is_cost]
    return utility(objectives, evaluation), *(cost.sign * evaluation.value(cost.name) for cost in costs)


def best_key(state: RunState, evaluation: Evaluation) -> tuple[tuple[float, ...], int]:
    """The key that the best candidate maximises: its `standing`, ties broken by the order of asking, not of arrival."""
    return standing(state.objectives, evaluation), -state.entries.position(evaluation.candidate_id)


def leader(state: RunState) -> str | None:
    """The id of the winner of the finals, or before the finals of the best on the search split; None if there are no results."""
    if state.best_id is not None:
        return state.best_id
    best = max(state.evaluated(), key=lambda evaluation: best_key(state, evaluation), default=None)
    return None if best is None else best.candidate_id


def front_of(state: RunState) -> Front:
    """The non-dominated candidates on the search split, baselines included.

    Raises:
        JournalError: the run has not started.
    """
    if not state.run:
        raise JournalError("nothing has been evaluated yet: this run is still starting, or was stopped while starting")
    front = Front(state.objectives)
    for evaluation in state.evaluated():
        front.add(evaluation)
    return front


def members_of(state: RunState, front: Front) -> list[Evaluation]:
    """The evaluations of a front's members on the search split, without item scores, sorted by id."""
    return [state.evaluations[name, Split.SEARCH] for name in front.ids]


def best_of_front(state: RunState) -> list[Evaluation]:
    """The members of the front, the best first."""
    return sorted(members_of(state, front_of(state)), key=lambda member: best_key(state, member), reverse=True)


def reference_losses(state: RunState) -> list[float] | None:
    """The hypervolume's reference point as losses (m,): as configured; by default score 0 for maximised tasks, the worst baseline for the rest.

    None as long as an objective that needs it has no evaluated baseline.
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
    """The entry for a user's choice: `best`, `knee`, or an id with or without the prefix `id:`.

    `best` is the winner of the finals, or before the finals the best on the search split; `knee` is the best of the front's `knees` (if it has
    none, of its ends); `42` means `c000042`.

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
