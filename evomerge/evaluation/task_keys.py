"""Checks the keys of a task file: none unknown to lm-eval, and all required ones present. Loads no task."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from evomerge.core import EvaluationError, did_you_mean

BELONGS_TO = ("tag", "group", "task_list")
"""Keys for the collections a task belongs to; lm-eval's `TaskConfig` does not accept them."""

_NEEDED = {"dataset_path": ("custom_dataset",), "doc_to_text": ("use_prompt",)}
"""required key -> keys that can replace it"""


def check_keys(path: str, settings: Mapping[str, Any]) -> None:
    """Check the keys of a local task file.

    Raises:
        EvaluationError: one is unknown or missing.
    """
    from lm_eval.config.task import TaskConfig

    known = {field.name for field in fields(TaskConfig)}
    for key in settings:
        if key not in known and key not in (*BELONGS_TO, "class"):
            hint = did_you_mean(str(key), known)
            raise EvaluationError(f"{path}: unknown key {key!r}{hint} lm-eval knows: {', '.join(sorted(known))}")
    needed = dict(_NEEDED)
    if settings.get("output_type") == "multiple_choice":
        needed["doc_to_choice"] = ("use_prompt",)
    for key, instead in needed.items():
        if all(settings.get(name) is None for name in (key, *instead)):
            raise EvaluationError(f"{path}: {key}: is missing")
