"""lm-eval's groups and tags: which tasks they contain, and how a group's score is computed from theirs. Loads no task.

Follows lm-eval 0.4.13 (`TaskFactory._build_group_members`, `Group.aggregate`): a group's score is the mean of a metric over all tasks
below it, optionally weighted by their numbers of items; tags, and groups without `aggregate_metric_list`, have no score of their own.
Groups that override anything but the number of examples of their tasks are refused.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from evomerge.core import EvaluationError, did_you_mean
from evomerge.evaluation.task_files import (
    is_group,
    is_task_file,
    named_task_file,
    named_tasks,
    number_of_shots,
    read_settings,
)

_GROUP_KEYS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"})
_MEMBER_KEYS = frozenset({"task", "task_alias", "num_fewshot"})


@dataclass(frozen=True, slots=True)
class Member:
    """A task of a group: its file or its name in lm-eval, and its number of few-shot examples (None: the task's own)."""

    task: str
    num_fewshot: int | None = None


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """A group or a tag.

    Attributes:
        name: its name.
        members: the tasks below it, in lm-eval's order.
        scores: its `aggregate_metric_list`; empty if it has no score of its own.
    """

    name: str
    members: tuple[Member, ...]
    scores: tuple[Mapping[str, Any], ...] = ()

    def score(self, metric: str | None) -> tuple[str, bool]:
        """(the members' `metric` or `metric,filter`, whether members are weighted by their numbers of items) for one of its scores.

        Args:
            metric: the wanted `metric` or `metric,filter`; None: the first.

        Raises:
            EvaluationError: it has no such score, or the score is not a mean.
        """
        known = {str(row.get("metric")): row for row in reversed(self.scores)}
        wanted, _, wanted_filter = (metric or str(self.scores[0].get("metric"))).partition(",")
        if wanted not in known:
            hint = did_you_mean(wanted, known)
            raise EvaluationError(f"group {self.name!r}: no score {wanted!r}{hint} It has: {', '.join(known)}")
        row = known[wanted]
        if row.get("aggregation") not in (None, "mean"):
            raise EvaluationError(
                f"group {self.name!r}: its score {wanted!r} must be a mean over its tasks, but its aggregation is {row['aggregation']}"
            )
        filters = _listed(row.get("filter_list"))
        if wanted_filter and filters and wanted_filter not in filters:
            raise EvaluationError(f"group {self.name!r}: no filter {wanted_filter!r}; it has: {', '.join(filters)}")
        chosen = wanted_filter or next(iter(filters), "")
        return f"{wanted},{chosen}" if chosen else wanted, bool(row.get("weight_by_size", True))


def find_group(task: str) -> TaskGroup | None:
    """The group or tag that a configuration calls `task`; None if it is a task or unknown.

    Args:
        task: path of a group's YAML file, or a name in lm-eval. Names in a file are looked up in the files of its folder and below, then in
            lm-eval's collection.

    Raises:
        EvaluationError: the file cannot be read, or the group cannot be used; gives the reason.
    """
    if is_task_file(task):
        path = Path(task)
        settings = read_settings(path, functions_as_text=True)
        return _group(settings, _folder(path.parent)) if is_group(settings) else None
    known = _collection()
    if task in known.groups:
        return _group(known.group(task), _Index())
    if task in known.tags and task not in known.tasks:
        return TaskGroup(task, _once(f"tag {task!r}", _named(task, f"tag {task!r}", _Index(), ())))
    return None


def find_task(task: str) -> None:
    """Check that the task or group that a configuration calls `task` exists.

    Raises:
        EvaluationError: it does not, or its file is not a task file.
    """
    if is_task_file(task):
        read_settings(Path(task), functions_as_text=True)
    elif task not in _collection():
        named_task_file(task)


@dataclass(slots=True)
class _Index:
    """An index of names: tasks (-> how a configuration names each), groups (-> their settings, or their files in lm-eval's collection), tags
    (-> names of their tasks)."""

    tasks: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Mapping[str, Any] | Path] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.tasks or name in self.groups or name in self.tags

    def group(self, name: str) -> Mapping[str, Any]:
        """The settings of a group."""
        found = self.groups[name]
        return _named_group(name, found) if isinstance(found, Path) else found


def _folder(folder: Path) -> _Index:
    """The names defined by task files in a folder and below; other files are skipped, as in lm-eval."""
    index = _Index()
    for path in sorted(folder.rglob("*.yaml"), key=Path.as_posix):
        try:
            settings = read_settings(path, functions_as_text=True)
        except EvaluationError:
            continue
        if is_group(settings):
            index.groups.setdefault(str(settings["group"]), settings)
        elif settings["task"] not in index.tasks:
            index.tasks[settings["task"]] = str(path)
            for tag in _listed(settings.get("tag")):
                index.tags.setdefault(str(tag), []).append(settings["task"])
    return index


@cache
def _collection() -> _Index:
    """lm-eval's own collection."""
    names = named_tasks()
    return _Index({name: name for name in names.tasks}, dict(names.groups), names.tags)


@cache
def _named_group(name: str, path: Path) -> Mapping[str, Any]:
    """The settings of one of lm-eval's groups; from lm-eval's own index if our stricter reader rejects its file."""
    try:
        return read_settings(path, functions_as_text=True)
    except EvaluationError:
        settings: Mapping[str, Any] = lm_evals_index()[name].cfg
        return settings


@cache
def lm_evals_index() -> Mapping[str, Any]:
    """lm-eval's own index of its collection; building it takes seconds."""
    from lm_eval.tasks import _index

    index: Mapping[str, Any] = _index.TaskIndex.build([Path(_index.__file__).parent])
    return index


def _group(settings: Mapping[str, Any], folder: _Index) -> TaskGroup:
    name = str(settings["group"])
    scores = settings.get("aggregate_metric_list") or []
    rows = [scores] if isinstance(scores, Mapping) else scores
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and row.get("metric") for row in rows):
        raise EvaluationError(f"group {name!r}: aggregate_metric_list must be a list of mappings with the key 'metric'")
    return TaskGroup(name, _once(f"group {name!r}", _members(settings, folder, ())), tuple(rows))


def _once(where: str, members: Iterator[Member]) -> tuple[Member, ...]:
    """The members. Raises EvaluationError if there are none or one appears twice."""
    found = tuple(members)
    twice = [task for task, count in Counter(member.task for member in found).items() if count > 1]
    if twice or not found:
        raise EvaluationError(f"{where}: {f'contains {twice[0]} twice' if twice else 'contains no tasks'}")
    return found


def _members(settings: Mapping[str, Any], folder: _Index, above: tuple[str, ...]) -> Iterator[Member]:
    """The tasks below a group; `above` are the groups that contain it."""
    name = str(settings["group"])
    where = f"group {name!r}"
    if name in above:
        raise EvaluationError(f"{where}: contains itself")
    _refuse(where, "its tasks", settings, _GROUP_KEYS)
    if not isinstance(settings.get("task"), list):
        raise EvaluationError(f"{where}: 'task' must be a list of its tasks")
    for item in settings["task"]:
        if isinstance(item, str):
            yield from _named(item, where, folder, (*above, name))
        elif isinstance(item, Mapping) and isinstance(item.get("group"), str):
            known = _index_of(item["group"], folder)
            if known is not None and item["group"] in known.groups:
                _refuse(where, item["group"], item, frozenset({"group"}))
                yield from _members(known.group(item["group"]), folder, (*above, name))
            else:
                yield from _members(item, folder, (*above, name))
        elif isinstance(item, Mapping) and isinstance(item.get("task"), str):
            _refuse(where, item["task"], item, _MEMBER_KEYS)
            shots = number_of_shots(f"{where}: {item['task']}", item.get("num_fewshot"))
            for member in _named(item["task"], where, folder, (*above, name)):
                yield Member(member.task, shots if "num_fewshot" in item else member.num_fewshot)
        else:
            raise EvaluationError(f"{where}: an entry of 'task' does not name a task or group: {item!r:.100}")


def _named(name: str, where: str, folder: _Index, above: tuple[str, ...]) -> Iterator[Member]:
    """The tasks that a group or a tag calls `name`."""
    index = _index_of(name, folder)
    if index is None:
        raise EvaluationError(f"{where}: {name!r} is not a task, group or tag in the files of its folder or in lm-eval")
    if name in index.tasks:
        yield Member(index.tasks[name])
    elif name in index.groups:
        yield from _members(index.group(name), folder, above)
    else:
        for task in index.tags[name]:
            yield Member(index.tasks[task])


def _index_of(name: str, folder: _Index) -> _Index | None:
    """The index that contains `name`; the folder's takes precedence over lm-eval's."""
    if name in folder:
        return folder
    return _collection() if name in _collection() else None


def _refuse(where: str, what: str, settings: Mapping[str, Any], allowed: frozenset[str]) -> None:
    extra = sorted(map(str, settings.keys() - allowed))
    if extra:
        raise EvaluationError(
            f"{where}: overrides {', '.join(extra)} of {what}, which is not supported; name its tasks one by one"
        )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
