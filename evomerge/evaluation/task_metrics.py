"""What a task's file says of the metric that is scored: whether it has it, and whether lower is better. Loads no task."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.core import EvaluationError, did_you_mean
from evomerge.evaluation.task_files import is_task_file, named_task_file, read_task_file
from evomerge.evaluation.task_spec import TaskSpec

_LOWER = frozenset({"bits_per_byte", "brier_score", "byte_perplexity", "perplexity", "ter", "word_perplexity"})
"""metrics of lm-eval 0.4.13 of which lower is better where a task does not say"""

_NO_MEANS = _LOWER | {"bleu", "chrf", "chrf++", "f1", "mcc"}
"""metrics of lm-eval 0.4.13 that are no mean over items where a task does not say"""


def lower_is_better(spec: TaskSpec) -> bool:
    """Whether the metric that is scored is one of which lower is better; False where that cannot be told.

    Raises:
        EvaluationError: a file cannot be read, or tasks of a group differ.
    """
    if not spec.members:
        row = _scored(spec)
        return bool(row) and not row.get("higher_is_better", _name(row) not in _LOWER)
    lower = {lower_is_better(member): member.task for member in spec.members}
    if len(lower) == 2:
        raise EvaluationError(
            f"group {spec.name!r}: of the metric of {lower[True]!r} lower is better, of that of {lower[False]!r} higher; "
            "their mean says nothing"
        )
    return lower.popitem()[0]


def check_metric(spec: TaskSpec) -> None:
    """Checks that a task, or each of a group, has the metric that is wanted of it.

    Raises:
        EvaluationError: one lists its metrics, and it is not among them.
    """
    for member in spec.members:
        check_metric(member)
    known = [_name(row) for row in _rows(spec.task)] if spec.metric and not spec.members else []
    wanted = (spec.metric or "").partition(",")[0]
    if known and wanted not in known:
        hint = did_you_mean(wanted, known)
        raise EvaluationError(f"task {spec.task!r}: no metric {wanted!r}{hint} It has: {', '.join(known)}")


def _scored(spec: TaskSpec) -> Mapping[str, Any]:
    """The row of `metric_list` that is scored: the wanted metric's, else that of the first mean over items; {} where there is none."""
    rows = _rows(spec.task)
    if spec.metric is not None:
        rows = [row for row in rows if _name(row) == spec.metric.partition(",")[0]]
    means = [row for row in rows if row.get("aggregation", "" if _name(row) in _NO_MEANS else "mean") == "mean"]
    return next(iter([*means, *rows]), {})


def _rows(task: str) -> list[Mapping[str, Any]]:
    """A task's `metric_list`; empty where it has none, or lm-eval is not installed to look it up."""
    if is_task_file(task):
        settings: Mapping[str, Any] = read_task_file(Path(task), functions_as_text=True)
    elif importlib.util.find_spec("lm_eval") is None:
        return []
    else:
        settings = importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml(
            named_task_file(task), resolve_func=False
        )
    rows = settings.get("metric_list") or []
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _name(row: Mapping[str, Any]) -> str:
    """The metric's name; of one that is a function (`!function module.name`) the function's."""
    return str(row.get("metric")).rpartition(".")[2]
