"""Reads task files as text: names, fingerprints and data files, without importing lm-eval."""

import copy
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from evomerge.core import EvaluationError, Split, did_you_mean, load_yaml, why_unreadable
from evomerge.evaluation.split_parts import split_name
from evomerge.evaluation.task_spec import TaskSpec

_NAME_LINE = re.compile(r"""^["']?(task|group)["']?:[ \t]*["']?([\w.:+/()-]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)

_TAG_LINES = re.compile(r"""^["']?tag["']?:(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE)

_INCLUDE_LINE = re.compile(r"""^["']?include["']?:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)

_NAME = re.compile(r"[\w.:+/()-]{2,}")

_SUFFIXES = ("", ".yaml", ".yml")
"""of lm-eval's task files; the files that they include may have none"""

_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
"""of files that contain items, not a task"""

_FUNCTION_TAG = re.compile(r"!function\s+([\w./-]+)")

_NO_TASK_FILE = "not an lm-eval task file: it needs a mapping with the key 'task'"


def is_task_file(task: str) -> bool:
    """Whether `task` is the path of a YAML file rather than the name of one of lm-eval's tasks."""
    return task.endswith((".yaml", ".yml"))


def is_group(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a YAML file are those of a group; tasks in old files may also have the key `group`, for the groups they belong to."""
    return "group" in settings and "dataset_path" not in settings


def read_task_file(path: Path, *, functions_as_text: bool = False) -> dict[str, Any]:
    """The settings of an lm-eval task file.

    Raises:
        EvaluationError: as for `read_settings`, or the file is a group.
    """
    settings = read_settings(path, functions_as_text=functions_as_text)
    if is_group(settings):
        raise EvaluationError(f"{path}: is a group of tasks, not a task")
    return settings


def read_settings(path: Path, *, functions_as_text: bool = False) -> dict[str, Any]:
    """The settings of an lm-eval task file or group file.

    Args:
        path: the file.
        functions_as_text: read `!function module.name` as text instead of refusing it; no code is run either way.

    Raises:
        EvaluationError: the file does not exist, is not YAML, is not a mapping that names a task or group, has a tag that runs code,
            or has a setting of the wrong form.
    """
    settings = _read(path, functions_as_text)[0]
    if not (is_group(settings) or isinstance(settings.get("task"), str)):
        raise EvaluationError(f"{path}: {_NO_TASK_FILE}")
    _check_forms(path, settings)
    return settings


def _check_forms(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that settings which must be mappings, or lists of mappings, are."""
    for key in ("dataset_kwargs", "fewshot_config"):
        if not isinstance(settings.get(key) or {}, dict):
            raise EvaluationError(f"{path}: {key}: expected settings by name, got {settings[key]!r}")
    samples = (settings.get("fewshot_config") or {}).get("samples")
    if not (samples is None or isinstance(samples, list) or _FUNCTION_TAG.match(str(samples))):
        raise EvaluationError(f"{path}: fewshot_config.samples: expected a list of rows, got {samples!r}")
    metrics = settings.get("metric_list") or []
    if not isinstance(metrics, list) or not all(
        isinstance(row, dict) and isinstance(row.get("metric"), str) for row in metrics
    ):
        raise EvaluationError(
            f"{path}: metric_list: expected metrics as in [{{metric: acc, aggregation: mean, higher_is_better: true}}], got {metrics!r}"
        )


def _read(path: Path, functions_as_text: bool, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The settings of a YAML file, overriding those of the files it includes as in lm-eval, and the list of all these files.

    `above` are the files that include it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EvaluationError(
            f"{above[-1]}: include: no such file: {path}" if above else f"no such task file: {path}"
        ) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise EvaluationError(f"{path}: {why_unreadable(problem)}") from None
    if functions_as_text:
        text = _FUNCTION_TAG.sub(r"'!function \1'", text)
    elif found := _FUNCTION_TAG.search(text):
        raise EvaluationError(
            f"{path}: {found.group()} runs Python code; set evaluation.trust_task_code: true if you trust this file"
        )
    settings = copy.deepcopy(_parsed(text, str(path)))
    if not isinstance(settings, dict):
        raise EvaluationError(f"{path}: {_NO_TASK_FILE}")
    included = settings.pop("include", None) or []
    merged: dict[str, Any] = {}
    files = [path]
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise EvaluationError(f"{path}: include: expected the name of a file, got {name!r}")
        file = path.parent / name
        if os.path.normpath(file) in map(os.path.normpath, (*above, path)):
            raise EvaluationError(f"{path}: include: {name} includes this file")
        below, more = _read(file, functions_as_text, (*above, path))
        below.pop("task_list", None)
        merged |= below
        files += more
    return merged | settings, files


@lru_cache(1024)
def _parsed(text: str, where: str) -> Any:
    """Parse YAML, with a cache, because each check reads the files of its task again."""
    return load_yaml(text, where, EvaluationError)


def number_of_shots(where: str, shots: Any) -> int | None:
    """The `num_fewshot` of a file. Raises EvaluationError if it is not a number of examples."""
    if shots is None or (isinstance(shots, int) and not isinstance(shots, bool) and shots >= 0):
        return shots
    raise EvaluationError(f"{where}: num_fewshot: expected a number of solved examples, got {shots!r}")


def task_name(task: str) -> str:
    """The name of a task: the one in its file, or the lm-eval name itself.

    Raises:
        EvaluationError: as for `read_task_file`.
    """
    return str(read_task_file(Path(task), functions_as_text=True)["task"]) if is_task_file(task) else task


def data_files(path: Path) -> dict[str, list[Path]]:
    """Data split -> its local files, with relative names resolved against the folder of the task file.

    Raises:
        EvaluationError: as for `read_task_file`, or a data file does not exist.
    """
    named = (read_task_file(path, functions_as_text=True).get("dataset_kwargs") or {}).get("data_files") or {}
    splits = named if isinstance(named, dict) else {"train": named}
    files: dict[str, list[Path]] = {}
    for split, names in splits.items():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str):
                raise EvaluationError(f"{path}: data_files: {split}: expected the name of a file, got {name!r}")
            file = path.parent / name
            if not file.is_file():
                raise EvaluationError(f"{path}: data file of split {split!r} does not exist: {file}")
            files.setdefault(str(split), []).append(file)
    return files


def check_task(spec: TaskSpec, needed: Sequence[Split]) -> None:
    """Check what can be checked of a task without loading it.

    Args:
        spec: the task.
        needed: the splits from which items are needed.

    Raises:
        EvaluationError: the task, its file or a data file does not exist; or a local data set lacks a needed split or the one for few-shot
            examples.
    """
    if not is_task_file(spec.task):
        named_task_file(spec.task)
        return
    parts = data_files(Path(spec.task))
    for split in needed:
        part = spec.data_split(split)
        if parts and (part is None or split_name(part) not in parts):
            raise EvaluationError(no_such_split(spec.name or task_name(spec.task), split, part, parts))
    settings = read_task_file(Path(spec.task), functions_as_text=True)
    source = (settings.get("fewshot_config") or {}).get("split") or settings.get("fewshot_split")
    shots = spec.n_examples(settings.get("num_fewshot"))
    if parts and shots and source is not None and split_name(str(source)) not in parts:
        hint = did_you_mean(str(source), parts)
        raise EvaluationError(
            f"{spec.task}: fewshot_split: no split {source!r}{hint} The data set has {', '.join(parts)}"
        )


def no_such_split(name: str, split: Split, part: str | None, parts: Iterable[str]) -> str:
    """The error message for a task whose data has no `part` for our `split`."""
    wanted = f"no split {split_name(part)!r}" if part else "nothing left"
    known = list(parts)
    whole = next((name for name in ("train", split.value, *known) if name in known), "train")
    return (
        f"task {name!r}: the data set has {wanted} for {split.value}; it has {', '.join(known)}. Choose one, or a part of one, under splits, "
        f"e.g. splits: {{search: '{whole}[:60%]', select: '{whole}[60%:80%]', report: '{whole}[80%:]'}}"
        + ("" if split is Split.SEARCH else ", or set finals: {finalists: 0} to search without finals")
    )


def named_task_file(task: str) -> Path:
    """The file of a task in lm-eval's collection.

    Raises:
        EvaluationError: there is no task of that name.
    """
    names = named_tasks()
    tasks = names.tasks
    if task not in tasks:
        if Path(task).suffix in _DATA:
            raise EvaluationError(
                f"{task}: is a data file, not a task; name it under data_files in a task file (docs/tasks.md has one to copy)"
            )
        hint = did_you_mean(task, {*names.tasks, *names.groups, *names.tags}, n=3)
        raise EvaluationError(f"lm-eval has no task {task!r}{hint} For a local task, give the path of its YAML file")
    return tasks[task]


class NamedTasks(NamedTuple):
    """The contents of lm-eval's collection: task -> file, group -> file, tag -> sorted names of its tasks."""

    tasks: dict[str, Path]
    groups: dict[str, Path]
    tags: dict[str, list[str]]


@cache
def named_tasks() -> NamedTasks:
    """The names in lm-eval's collection, found without importing lm-eval.

    Searches each file for a few lines instead of parsing thousands of files, as lm-eval's `TaskManager` does, which takes ten times as long. A
    file without tags inherits those of the file it includes.
    """
    package = importlib.util.find_spec("lm_eval")
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    tags_in: dict[Path, list[str]] = {}
    included: dict[Path, Path] = {}
    for folder in package.submodule_search_locations or () if package else ():
        for path in sorted((Path(folder) / "tasks").rglob("*")):
            if path.suffix not in _SUFFIXES or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            found = dict(_NAME_LINE.findall(text)) if path.suffix else {}
            if "task" in found:
                tasks.setdefault(found["task"], path)
            elif "group" in found:
                groups.setdefault(found["group"], path)
            if lines := _TAG_LINES.findall(text):
                tags_in[path] = [name for line in lines for name in _NAME.findall(line)]
            if include := _INCLUDE_LINE.search(text):
                included[path] = Path(os.path.normpath(path.parent / include[1]))
    return NamedTasks(tasks, groups, _tags(tasks, tags_in, included))


def _tags(
    tasks: Mapping[str, Path], tags_in: Mapping[Path, Sequence[str]], included: Mapping[Path, Path]
) -> dict[str, list[str]]:
    """Tag -> its tasks, from the tags in each file and the file that each includes."""
    tags: dict[str, set[str]] = {}
    for task, file in tasks.items():
        above = {file}
        while file not in tags_in and included.get(file, file) not in above:
            file = included[file]
            above.add(file)
        for tag in tags_in.get(file, ()):
            tags.setdefault(tag, set()).add(task)
    return {tag: sorted(members) for tag, members in tags.items()}


def task_fingerprint(spec: TaskSpec) -> str:
    """A hash of a task file with its includes and data files; for one of lm-eval's tasks, of its name only; for a group, of its tasks and their weighting."""
    task = spec.task
    if spec.members:
        marks = [*map(task_fingerprint, spec.members), spec.members[0].metric, spec.weight_by_size]
        return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]
    digest = hashlib.sha256(task_name(task).encode())
    if is_task_file(task):
        path = Path(task)
        for file in _read(path, functions_as_text=True)[1]:
            digest.update(file.read_bytes())
        for names in data_files(path).values():
            for name in names:
                digest.update(name.read_bytes())
    return digest.hexdigest()[:16]
