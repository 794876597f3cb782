"""Task files as text: their name and fingerprint, without loading lm-eval."""

import hashlib
import re
from pathlib import Path
from typing import Any

from evomerge.core import EvaluationError, load_yaml


def is_task_file(task: str) -> bool:
    """Whether `task` is the path of a YAML file rather than a name that lm-eval knows."""
    return task.endswith((".yaml", ".yml"))


_FUNCTION_TAG = re.compile(r"!function\s+([\w./-]+)")


def read_task_file(path: Path, *, functions_as_text: bool = False) -> dict[str, Any]:
    """The settings of an lm-eval task file.

    Args:
        path: the file.
        functions_as_text: read `!function module.name` as that text instead of refusing it; nothing is run either way.

    Raises:
        EvaluationError: no such file, not YAML, not a mapping, or a tag that runs code.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EvaluationError(f"no such task file: {path}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise EvaluationError(f"{path}: not readable: {problem}") from None
    if functions_as_text:
        text = _FUNCTION_TAG.sub(r"'!function \1'", text)
    elif found := _FUNCTION_TAG.search(text):
        raise EvaluationError(
            f"{path}: {found.group()} runs Python code; set evaluation.trust_task_code: true if you trust this file"
        )
    settings = load_yaml(text, str(path), EvaluationError)
    if not isinstance(settings, dict) or not isinstance(settings.get("task"), str):
        raise EvaluationError(f"{path}: not an lm-eval task file: it needs a mapping with the key 'task'")
    return settings


def task_name(task: str) -> str:
    """The name of a task: what its file says, or the lm-eval name itself.

    Raises:
        EvaluationError: as `read_task_file`.
    """
    return str(read_task_file(Path(task), functions_as_text=True)["task"]) if is_task_file(task) else task


def data_files(path: Path) -> dict[str, list[Path]]:
    """Data split -> the local files a task file reads it from, relative names counted from the task file.

    Raises:
        EvaluationError: as `read_task_file`, or a file that is not there.
    """
    named = (read_task_file(path, functions_as_text=True).get("dataset_kwargs") or {}).get("data_files") or {}
    splits = named if isinstance(named, dict) else {"train": named}
    files = {
        str(split): [path.parent / name for name in (names if isinstance(names, list) else [names])]
        for split, names in splits.items()
    }
    for split, names in files.items():
        for name in names:
            if not name.is_file():
                raise EvaluationError(f"{path}: data file of split {split!r} is not there: {name}")
    return files


def task_fingerprint(task: str) -> str:
    """A hash of a task file and its data files; of the name alone for a task of lm-eval's."""
    digest = hashlib.sha256(task_name(task).encode())
    if is_task_file(task):
        path = Path(task)
        digest.update(path.read_bytes())
        for names in data_files(path).values():
            for name in names:
                digest.update(name.read_bytes())
    return digest.hexdigest()[:16]
