"""The finals: finalists are ranked on items the search never saw, and the winner is scored once on the report items.

Choosing by the score that was optimised rewards luck; the three splits keep the reported number honest.
"""

import math
from collections.abc import Sequence

from evomerge.core import EvaluationError, Split, Status
from evomerge.search import events
from evomerge.search.loop import SearchLoop
from evomerge.search.ranking import front_of, standing
from evomerge.search.recorder import RunRecorder
from evomerge.search.state import RunState


def run_finals(loop: SearchLoop, recorder: RunRecorder, n_finalists: int) -> RunState:
    """Rank finalists and baselines on `select`, score the winner and every baseline on `report`, and mark the run finished.

    Existing evaluations on these splits are not repeated, so nothing happens on a finished run unless the number of finalists has changed.
    If all finalists failed in an earlier session, or the winner failed on `report`, these are tried again.

    Raises:
        EvaluationError: every evaluation failed on the search or the select split.
        Interrupted: a stop was requested.
    """
    state = recorder.state
    finalists = choose_finalists(state, n_finalists)
    if tuple(finalists) != state.finalists:
        recorder.record(events.finalists(finalists))
    baselines = [entry.id for entry in state.baselines]
    loop.retry_if_all_failed([*baselines, *finalists], Split.SELECT)
    loop.evaluate_all([*baselines, *finalists], Split.SELECT)
    best = best_on_select(state, [*finalists, *baselines])
    if best != state.best_id:
        recorder.record(events.best(best))
    loop.retry_if_all_failed([best], Split.REPORT)
    loop.evaluate_all(list(dict.fromkeys([*baselines, best])), Split.REPORT)
    if not state.finished:
        recorder.record(events.finished())
    return state


def in_finals(state: RunState, split: Split) -> set[str]:
    """The ids of all candidates that the finals evaluate on `split`, select or report."""
    chosen = state.finalists if split is Split.SELECT else filter(None, [state.best_id])
    return {*chosen, *(entry.id for entry in state.baselines)}


def choose_finalists(state: RunState, count: int) -> list[str]:
    """The `count` best candidates on the search split: half by `standing`, the rest from the front, then again by standing; ties by smaller id.

    Baselines are not counted, since all of them are in the finals anyway.

    Raises:
        EvaluationError: there are no evaluations, or every one failed, including those of baselines.
    """
    if not state.n_evaluations[Split.SEARCH]:
        raise EvaluationError("nothing has been evaluated, so there are no candidates for the finals; raise the budget")
    good = sorted(state.evaluated(), key=lambda evaluation: evaluation.candidate_id)
    if not good:
        raise EvaluationError("every evaluation failed, so there are no candidates for the finals")
    ranked = [evaluation for evaluation in good if not state.entries.is_baseline(evaluation.candidate_id)]
    ranked.sort(key=lambda evaluation: standing(state.objectives, evaluation), reverse=True)
    names = [evaluation.candidate_id for evaluation in ranked]
    front = front_of(state)
    first = names[: (count + 1) // 2]
    return list(dict.fromkeys([*first, *(name for name in names if name in front), *names]))[:count]


def best_on_select(state: RunState, names: Sequence[str]) -> str:
    """The candidate with the highest `standing` on `select`; ties by the standing on `search`, then the smaller id.

    Raises:
        EvaluationError: all of them failed there.
    """
    results = [state.evaluations[name, Split.SELECT] for name in dict.fromkeys(names)]
    good = [result for result in results if result.status is Status.OK]
    if not good:
        raise EvaluationError(
            f"every finalist failed on the select split; the first error: {results[0].error}\nFix the cause and resume the run to evaluate them again"
        )
    return max(
        sorted(good, key=lambda evaluation: evaluation.candidate_id),
        key=lambda evaluation: (standing(state.objectives, evaluation), _on_search(state, evaluation.candidate_id)),
    ).candidate_id


def _on_search(state: RunState, name: str) -> tuple[float, ...]:
    """The standing on `search`; below all others if a baseline failed there."""
    evaluation = state.evaluations[name, Split.SEARCH]
    return standing(state.objectives, evaluation) if evaluation.status is Status.OK else (-math.inf,)
