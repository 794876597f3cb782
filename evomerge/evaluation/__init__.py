"""Scores candidates: on lm-eval tasks with a running engine, or on test functions.

Importing this package imports neither torch nor lm-eval: `LmEvalEvaluator`, `TaskSet` and `load_task` are imported on first use, and
`evomerge.evaluation.synthetic` and `evomerge.evaluation.task_files` are lightweight.
"""

from typing import TYPE_CHECKING, Any

from evomerge.evaluation.synthetic import SyntheticEvaluator, synthetic_task_names
from evomerge.evaluation.task_spec import PromptFormat, TaskSpec

if TYPE_CHECKING:
    from evomerge.evaluation.lm_eval_evaluator import LmEvalEvaluator
    from evomerge.evaluation.loaded_task import LoadedTask, load_task
    from evomerge.evaluation.task_set import TaskSet

_LAZY = {
    "LmEvalEvaluator": "evomerge.evaluation.lm_eval_evaluator",
    "LoadedTask": "evomerge.evaluation.loaded_task",
    "TaskSet": "evomerge.evaluation.task_set",
    "load_task": "evomerge.evaluation.loaded_task",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "LmEvalEvaluator",
    "LoadedTask",
    "PromptFormat",
    "SyntheticEvaluator",
    "TaskSet",
    "TaskSpec",
    "load_task",
    "synthetic_task_names",
]
