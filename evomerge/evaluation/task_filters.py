"""Checks that lm-eval can construct a task file's filters, which are applied to the model's answers. Loads no task."""

import re
from collections.abc import Mapping
from typing import Any

from evomerge.core import EvaluationError, did_you_mean

_FORM = "expected filters as in [{name: number, filter: [{function: regex, regex_pattern: '[0-9]+'}, {function: take_first}]}]"


def check_filters(where: str, settings: Mapping[str, Any]) -> None:
    """Check `filter_list`. Python functions are left to lm-eval, and so are unknown names if the file has code, which may register them.

    Raises:
        EvaluationError: it does not have the form that lm-eval reads, or a function is unknown or does not take these arguments.
    """
    rows = settings.get("filter_list")
    if rows is None:
        return
    if not isinstance(rows, list) or not rows:
        raise EvaluationError(f"{where}: filter_list: {_FORM}, got {rows!r}")
    for row in rows:
        steps = row.get("filter") if isinstance(row, Mapping) else None
        named = isinstance(row, Mapping) and isinstance(row.get("name"), str)
        if not named or not isinstance(steps, list) or not steps:
            raise EvaluationError(f"{where}: filter_list: {_FORM}, got {row!r}")
        for step in steps:
            if not isinstance(step, Mapping) or not step.get("function"):
                raise EvaluationError(f"{where}: filter_list: {row['name']}: {_FORM}, got {step!r}")
            _check_step(f"{where}: filter_list: {row['name']}", step, has_code="!function" in repr(settings))


def _check_step(where: str, step: Mapping[str, Any], *, has_code: bool) -> None:
    function = step["function"]
    if not isinstance(function, str) or function.startswith("!function"):
        return
    import lm_eval.filters  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import filter_registry as known

    if function not in known:
        if has_code:
            return
        hint = did_you_mean(function, known)
        raise EvaluationError(f"{where}: unknown function {function!r}{hint} Known: {', '.join(sorted(known))}")
    try:
        known.get(function)(**{key: value for key, value in step.items() if key != "function"})
    except (TypeError, ValueError, LookupError, AttributeError, re.error) as error:
        raise EvaluationError(f"{where}: {function} cannot be constructed from {dict(step)!r}: {error}") from None
