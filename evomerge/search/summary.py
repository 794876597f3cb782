"""`summary.json`: the results of a run, with standard errors and paired comparisons. Only numbers; the CLI prints the tables."""

import math
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np

from evomerge.core import (
    Evaluation,
    Json,
    Objective,
    Split,
    Status,
    is_task_arithmetic,
    model_of_baseline,
    standard_error,
    weights_in_mean,
)
from evomerge.search.front_files import front_json
from evomerge.search.ranking import front_of, leader, utility
from evomerge.search.state import RunState

Z_95 = 1.959964
"""Two-sided 95% quantile of the normal distribution."""


class Row(TypedDict):
    """One model on one split.

    Attributes:
        scores: objective -> score or cost.
        stderr: task -> standard error of its score.
        mean, mean_stderr: mean of the objectives (`utility`) and its standard error.
    """

    scores: dict[str, float]
    stderr: dict[str, float]
    mean: float
    mean_stderr: float


class Comparison(TypedDict):
    """A paired difference, best - baseline, of the mean over tasks, with its 95% interval."""

    difference: float
    low: float
    high: float


class Summary(TypedDict):
    """The content of `summary.json`; docs/run-directory.md explains every key."""

    evaluations: int
    items: int
    wall_s: float
    splits: dict[str, dict[str, Json]]
    best_id: str | None
    front: Json
    hypervolume: Json
    details: dict[str, dict[str, Row]]
    comparisons: dict[str, Comparison]
    overhead: dict[str, float]
    strategy: dict[str, Json]
    failed: int


ReadItems = Callable[[str, Split], Evaluation]
"""(id, split) -> the evaluation with its item scores"""


def summarize(state: RunState, read_items: ReadItems) -> Summary:
    """The content of `summary.json`."""
    front = front_json(state, front_of(state))
    details = {split.value: _details(state, split) for split in Split}
    return {
        "evaluations": state.n_evaluations[Split.SEARCH],
        "items": int(sum(evaluation.cost.get("items", 0) for evaluation in state.evaluations.values())),
        "wall_s": state.elapsed_s,
        "splits": {split: _scores(state, rows) for split, rows in details.items()},
        "best_id": state.best_id,
        "front": front["members"],
        "hypervolume": front["hypervolume"],
        "details": details,
        "comparisons": _comparisons(state, read_items),
        "overhead": overhead(state),
        "strategy": dict(state.diagnostics),
        "failed": state.evaluations.count(Status.FAILED),
    }


def overhead(state: RunState) -> dict[str, float]:
    """Time per candidate and its parts, in seconds, and the share that is spent neither in the engine nor on scoring.

    Medians over the search split, since the first candidates on each machine include compilation; the time to ask is a mean.
    """
    costs = [evaluation.cost for evaluation in state.evaluated() if "total_s" in evaluation.cost]
    if not costs:
        return {}
    names = sorted({name for cost in costs for name in cost if name.endswith("_s")})
    medians = {name: float(np.median([cost.get(name, 0.0) for cost in costs])) for name in names}
    total = medians.pop("total_s")
    ask = state.ask_s / max(1, state.n_proposed)
    other = ask + total - medians.get("engine_s", 0.0) - medians.get("score_s", 0.0)
    slowest = max(float(cost["total_s"]) for cost in costs)
    return {
        "candidate_s": ask + total,
        "ask_s": ask,
        **medians,
        "share": other / (ask + total),
        "slowest_candidate_s": slowest,
    }


def mean_with_error(objectives: tuple[Objective, ...], evaluation: Evaluation) -> tuple[float, float]:
    """`utility` and its standard error (items of different tasks are independent)."""
    weights = weights_in_mean(objectives)
    weighted = zip(objectives, weights, strict=True)
    errors = [weight * evaluation.stderr.get(objective.name, 0.0) for objective, weight in weighted]
    return utility(objectives, evaluation), math.hypot(*errors) / sum(weights)


def _scores(state: RunState, details: Mapping[str, Row]) -> dict[str, Json]:
    """The scores in `details` of every source (by model name), every other baseline, and the best; {} for those without scores."""

    def scores(name: str) -> Json:
        return dict(details[name]["scores"]) if name in details else {}

    names = [entry.id for entry in state.baselines]
    return {
        "sources": {model: scores(name) for name in names if (model := model_of_baseline(name))},
        "baselines": {name: scores(name) for name in names if not model_of_baseline(name)},
        "best": scores(state.best_id or ""),
    }


def _details(state: RunState, split: Split) -> dict[str, Row]:
    """id -> scores, standard errors, and mean with standard error, for baselines, finalists and the leader."""
    names = [entry.id for entry in state.baselines]
    names += [name for name in dict.fromkeys([*state.finalists, leader(state)]) if name and name not in names]
    details: dict[str, Row] = {}
    for name in names:
        evaluation = state.evaluations.get((name, split))
        if evaluation is not None and evaluation.status is Status.OK:
            mean, error = mean_with_error(state.objectives, evaluation)
            details[name] = {
                "scores": {objective.name: evaluation.value(objective.name) for objective in state.objectives},
                "stderr": dict(evaluation.stderr),
                "mean": mean,
                "mean_stderr": error,
            }
    return details


def _comparisons(state: RunState, read_items: ReadItems) -> dict[str, Comparison]:
    """Baseline id -> paired difference best - baseline of the mean over tasks on `report`, with its 95% interval.

    Empty if intervals cannot be computed: no objective is a task, or a task has only one item.
    """
    if state.best_id is None or state.evaluations.place(state.best_id, Split.REPORT) is None:
        return {}
    best = read_items(state.best_id, Split.REPORT)
    names = [objective.name for objective in state.objectives]
    counts = [len(best.item_scores[name]) for name in names if name in best.item_scores]
    if min(counts, default=0) < 2:
        return {}
    result: dict[str, Comparison] = {}
    for entry in state.baselines:
        if entry.id != state.best_id and state.evaluations.place(entry.id, Split.REPORT) is not None:
            difference, error = paired_difference(state.objectives, best, read_items(entry.id, Split.REPORT))
            result[entry.id] = {
                "difference": difference,
                "low": difference - Z_95 * error,
                "high": difference + Z_95 * error,
            }
    return result


def paired_difference(objectives: tuple[Objective, ...], first: Evaluation, second: Evaluation) -> tuple[float, float]:
    """`utility` of `first` minus that of `second` (positive: first is better) and its standard error, paired by item.

    Every task needs at least two items. Differences in costs are included without an error.
    """
    weights = weights_in_mean(objectives)
    total, errors = 0.0, list[float]()
    for objective, weight in zip(objectives, weights, strict=True):
        if not weight:
            continue
        if objective.name not in first.item_scores:
            total += weight * objective.sign * (first.value(objective.name) - second.value(objective.name))
            continue
        ours, theirs = first.item_scores[objective.name], second.item_scores[objective.name]
        difference = objective.sign * (ours.astype(np.float64) - theirs)
        total += weight * float(difference.mean())
        errors.append(weight * standard_error(difference, first.sample_sizes.get(objective.name, ())))
    return total / sum(weights), math.hypot(*errors) / sum(weights)


def headline(state: RunState, details: Mapping[str, Row]) -> tuple[list[str], str | None]:
    """The rows of a table of the run: baselines (task arithmetic only with the weight that is best on the search split), and the winner or best so far.

    Args:
        state: the run.
        details: `details.search` of the summary.

    Returns:
        The ids, and the id of task arithmetic (None if there is none).
    """
    tuned = tuned_task_arithmetic(details)
    names = [entry.id for entry in state.baselines if not is_task_arithmetic(entry.id) or entry.id == tuned]
    return names + [name for name in [leader(state)] if name and name not in names], tuned


def remarks_on_finals(state: RunState) -> list[str]:
    """Remarks to show with the winner of the finals, if there is one: that it is a baseline, or that the search has continued since."""
    if state.best_id is None:
        return []
    remarks = []
    if state.entries[state.best_id].baseline:
        n_found = sum(not state.entries.is_baseline(name) for name in state.finalists)
        in_finals = f" (of {n_found} in the finals)" if n_found else " (none was in the finals)"
        remarks.append(f"no merge found by the search{in_finals} beats {state.best_id} on the select split")
    if state.search_continued:
        remarks.append(
            "the winner and scores are those of the last finals; the search has continued since, and new finals will follow"
        )
    return remarks


def indifferent(state: RunState) -> dict[str, float]:
    """Task -> score, for the tasks among the objectives on which all baselines (at least two) have the same score on the search split."""
    results = [state.evaluations.get((entry.id, Split.SEARCH)) for entry in state.baselines]
    good = [result for result in results if result is not None and result.status is Status.OK]
    names = [objective.name for objective in state.objectives if not objective.is_cost]
    scores = {name: {result.value(name) for result in good} for name in names}
    return {name: values.pop() for name, values in scores.items() if len(good) > 1 and len(values) == 1}


def items_of_candidate(state: RunState, split: Split) -> int | None:
    """The total number of items that a candidate is scored on; None if unknown."""
    counts = (evaluation.cost.get("items") for evaluation in state.evaluations.values() if evaluation.split is split)
    return next((int(count) for count in counts if count), None)


def verdict(comparison: Comparison) -> str:
    """Whether the best is better than a baseline, according to the interval of the comparison."""
    return "better" if comparison["low"] > 0 else "worse" if comparison["high"] < 0 else "no difference shown"


def tuned_task_arithmetic(details: Mapping[str, Row]) -> str | None:
    """The id of the task-arithmetic baseline with the best mean in `details` (of the search split)."""
    names = filter(is_task_arithmetic, details)
    return max(names, key=lambda name: details[name]["mean"], default=None)
