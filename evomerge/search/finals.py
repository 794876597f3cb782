"""The finals: finalists are ranked on items the search never saw, and the winner is scored once on the report items.

Choosing by the score that was optimised rewards luck; the three splits keep the reported number honest.
"""

import math
from collections.abc import Sequence

from evomerge.core import EvaluationError, Split, Status
from evomerge.search.journal import event
from evomerge.search.loop import SearchLoop
from evomerge.search.ranking import front_of, standing
from evomerge.search.recorder import RunRecorder
from evomerge.search.state import RunState


def run_finals(loop: SearchLoop, recorder: RunRecorder, n_finalists: int) -> RunState:
    """Ranks on `select`, scores the winner and every baseline on `report`, and marks the run finished.

    What has been evaluated on these splits before is not evaluated again, so on a finished run nothing happens, unless another number of
    finalists is wanted now. Where an earlier session could not finish because all finalists failed, or the winner has no report score,
    these are tried again.

    Raises:
        EvaluationError: nothing was evaluated well on the search or the select split.
        Interrupted: a stop was requested.
    """
    state = recorder.state
    finalists = choose_finalists(state, n_finalists)
    if tuple(finalists) != state.finalists:
        recorder.record(event("finalists", ids=finalists))
    baselines = [entry.id for entry in state.baselines]
    loop.retry_if_all_failed([*baselines, *finalists], Split.SELECT)
    loop.evaluate_all([*baselines, *finalists], Split.SELECT)
    best = best_on_select(state, [*finalists, *baselines])
    if best != state.best_id:
        recorder.record(event("best", id=best))
    loop.retry_if_all_failed([best], Split.REPORT)
    loop.evaluate_all(list(dict.fromkeys([*baselines, best])), Split.REPORT)
    if not state.finished:
        recorder.record(event("finished"))
    return state


def in_finals(state: RunState, split: Split) -> set[str]:
    """The ids of all that the finals evaluate on `split`, select or report."""
    chosen = state.finalists if split is Split.SELECT else filter(None, [state.best_id])
    return {*chosen, *(entry.id for entry in state.baselines)}


def choose_finalists(state: RunState, count: int) -> list[str]:
    """The `count` best on the search split: half by their `standing`, the rest from the front, then by the standing; of equals the smaller id.

    Baselines, all of which are in the finals anyway, take no one's place.

    Raises:
        EvaluationError: no evaluation ended well, not even a baseline's.
    """
    good = sorted(state.evaluated(), key=lambda item: item.candidate_id)
    if not good:
        raise EvaluationError("no candidate was evaluated well, so there is nothing to choose from")
    ranked = [item for item in good if not state.entries.is_baseline(item.candidate_id)]
    ranked.sort(key=lambda item: standing(state.objectives, item), reverse=True)
    names = [item.candidate_id for item in ranked]
    front = front_of(state)
    first = names[: (count + 1) // 2]
    return list(dict.fromkeys([*first, *(name for name in names if name in front), *names]))[:count]


def best_on_select(state: RunState, names: Sequence[str]) -> str:
    """The one with the highest `standing` on `select`; of equals the better on `search`, then the smaller id.

    Raises:
        EvaluationError: every one failed there.
    """
    results = [state.evaluations[name, Split.SELECT] for name in dict.fromkeys(names)]
    good = [result for result in results if result.status is Status.OK]
    if not good:
        raise EvaluationError(
            f"every finalist failed on the select split; the first: {results[0].error}\nMend the cause and resume the run: they are evaluated again"
        )
    return max(
        sorted(good, key=lambda item: item.candidate_id),
        key=lambda item: (standing(state.objectives, item), _on_search(state, item.candidate_id)),
    ).candidate_id


def _on_search(state: RunState, name: str) -> tuple[float, ...]:
    """The standing on `search`; below all others where a baseline failed there."""
    evaluation = state.evaluations[name, Split.SEARCH]
    return standing(state.objectives, evaluation) if evaluation.status is Status.OK else (-math.inf,)
