"""The scored metric according to a task's file: whether it exists, and whether lower is better. Loads no task."""

from collections.abc import Mapping
from typing import Any

from evomerge.core import EvaluationError, did_you_mean
from evomerge.evaluation.task_settings import settings_as_text
from evomerge.evaluation.task_spec import TaskSpec

_LOWER = frozenset({"bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity"})
"""metrics of lm-eval 0.4.13 for which lower is better unless a task says otherwise"""

OTHER_SCALES = _LOWER - {"brier_score"} | {"bleu", "chrf", "chrf++"}
"""metrics of lm-eval 0.4.13 that do not range from 0 to 1: percentages, bits and perplexities"""

_NO_MEANS = _LOWER | {"bleu", "chrf", "chrf++", "f1", "mcc"}
"""metrics of lm-eval 0.4.13 that are not a mean over items unless a task says otherwise"""


def lower_is_better(spec: TaskSpec) -> bool:
    """Whether lower is better for the scored metric; False if unknown.

    Raises:
        EvaluationError: a file cannot be read, or the tasks of a group disagree.
    """
    if not spec.members:
        row = _scored(spec)
        return bool(row) and not row.get("higher_is_better", _name(row) not in _LOWER)
    lower = {lower_is_better(member): member.task for member in spec.members}
    if len(lower) == 2:
        raise EvaluationError(
            f"group {spec.name!r}: lower is better for the metric of {lower[True]!r}, higher for that of {lower[False]!r}; "
            "their mean is meaningless"
        )
    return lower.popitem()[0]


def check_metric(spec: TaskSpec) -> None:
    """Check that a task, or each task of a group, has the requested metric and filter.

    Raises:
        EvaluationError: it does not, according to its file.
    """
    if spec.members:
        try:
            for member in spec.members:
                check_metric(member)
        except EvaluationError as error:
            raise EvaluationError(
                f"group {spec.name!r}: not all of its tasks have the score {spec.members[0].metric!r} ({error}); list its tasks or smaller "
                "groups one by one"
            ) from error
        return
    rows = _rows(spec.task)
    if not rows:
        return
    wanted, _, wanted_filter = (spec.metric or _name(_scored(spec))).partition(",")
    filters = _filters(spec.task)
    known = [f"{_name(row)},{name}" if len(filters) > 1 else _name(row) for row in rows for name in filters]
    if wanted not in map(_name, rows):
        hint = did_you_mean(wanted, known)
        raise EvaluationError(f"task {spec.task!r}: no metric {wanted!r}{hint} It has: {', '.join(known)}")
    if wanted_filter and wanted_filter not in filters:
        hint = did_you_mean(wanted_filter, filters)
        raise EvaluationError(f"task {spec.task!r}: no filter {wanted_filter!r}{hint} It has: {', '.join(filters)}")


def scored_metric(spec: TaskSpec) -> str:
    """The metric that scores a task or group, as lm-eval prints it; without the filter if there is only one, empty if unknown."""
    first = spec.tasks[0]
    rows, filters = _rows(first.task), _filters(first.task)
    wanted, _, wanted_filter = (first.metric or (_name(_scored(first)) if rows else "")).partition(",")
    return f"{wanted},{wanted_filter or filters[0]}" if wanted and len(filters) > 1 else wanted


def _scored(spec: TaskSpec) -> Mapping[str, Any]:
    """The row of `metric_list` that is scored: that of the requested metric, else of the first mean over items, else the first; {} if there is none."""
    rows = _rows(spec.task)
    if spec.metric is not None:
        rows = [row for row in rows if _name(row) == spec.metric.partition(",")[0]]
    return next(iter([*filter(_is_mean, rows), *rows]), {})


def _rows(task: str) -> list[Mapping[str, Any]]:
    """A task's `metric_list`; empty if it has none."""
    return settings_as_text(task).get("metric_list") or []


def _filters(task: str) -> list[str]:
    """Names of a task's filters, as lm-eval prints them after a metric."""
    filters = settings_as_text(task).get("filter_list") or []
    return [str(row.get("name")) for row in filters if isinstance(row, Mapping)] or ["none"]


def _is_mean(row: Mapping[str, Any]) -> bool:
    return bool(row.get("aggregation", "" if _name(row) in _NO_MEANS else "mean") == "mean")


def _name(row: Mapping[str, Any]) -> str:
    """The metric's name; for a function (`!function module.name`), the function's name."""
    return str(row.get("metric")).rpartition(".")[2]
