"""The tasks of a configuration by the names of their scores, and checks whether a search can use them. Loads no data."""

from dataclasses import replace

from evomerge.config import LmEvalConfig, SearchConfig, SyntheticConfig, TaskConfig
from evomerge.core import EvaluationError, EvomergeError, Split, cost_key
from evomerge.evaluation import PromptFormat, TaskSpec
from evomerge.evaluation.task_checks import (
    check_not_scored_on,
    check_one_split_each,
    check_packages,
    check_splits,
    check_supported,
)
from evomerge.evaluation.task_files import check_task, task_name
from evomerge.evaluation.task_groups import find_group
from evomerge.evaluation.task_metrics import check_metric
from evomerge.evaluation.task_settings import check_runs_nothing


def task_specs(config: SearchConfig) -> list[TaskSpec]:
    """The specs of the tasks and groups for the evaluator. A group without its own score (a tag) is replaced by its tasks.

    Raises:
        EvaluationError: one part of a data set is used as several splits, or a group cannot be used.
    """
    return [spec for task in config.tasks for spec in _specs(config, task)]


def needed_splits(config: SearchConfig) -> tuple[Split, ...]:
    """The splits that a search uses: all, or without finals only `search`."""
    return tuple(Split) if config.finals.finalists else (Split.SEARCH,)


def checked_tasks(config: SearchConfig, *, begun: bool) -> tuple[dict[str, TaskSpec], list[str]]:
    """Name of every score -> its task, and messages for all problems with the tasks that can be found without loading them.

    If the run has already `begun`, it is not checked whether searching on the tasks' splits is allowed.
    """
    tasks: dict[str, TaskSpec] = {}
    twice: dict[str, None] = {}
    errors: list[str] = []
    for task in config.tasks:
        try:
            for spec in _specs(config, task):
                _check(spec, config, on_test=task.search_on_test or begun)
                name = spec.name or task_name(spec.task)
                if cost_key(name) is not None:
                    raise EvaluationError(
                        f"tasks: {name!r}: names that start with 'cost.' are reserved for costs; rename it"
                    )
                if tasks.setdefault(name, spec) is not spec:
                    twice[name] = None
        except EvomergeError as error:
            errors.append(str(error))
    if twice:
        errors.append(f"tasks: several tasks are called {', '.join(twice)}; give each a different name")
    return tasks, errors


def _check(spec: TaskSpec, config: SearchConfig, *, on_test: bool) -> None:
    """Raise EvaluationError if a search cannot score the task; `on_test`: allow searching on the split of its published scores."""
    trusted = not isinstance(config.evaluation, LmEvalConfig) or config.evaluation.trust_task_code
    for task in spec.tasks:
        if not on_test:
            check_not_scored_on(task)
    for task in spec.tasks:
        check_task(task, needed_splits(config))
        if not trusted:
            check_runs_nothing(task)
        # a group's num_fewshot applies only to those of its tasks that support few-shot examples
        check_supported(replace(task, num_fewshot=None) if spec.members else task)
    check_metric(spec)
    for task in spec.tasks:
        check_splits(task, needed_splits(config))
        check_packages(task)


def _specs(config: SearchConfig, given: TaskConfig) -> list[TaskSpec]:
    wanted = config.evaluation
    if isinstance(wanted, SyntheticConfig):
        return []
    spec = TaskSpec(
        task=given.task,
        name=given.name,
        metric=given.metric,
        splits={Split(ours): theirs for ours, theirs in given.splits.items()},
        limit=given.limit,
        search_items=wanted.search_items,
        seed=config.seed,
        num_fewshot=given.num_fewshot,
        drop_shared=given.drop_shared,
        prompt=PromptFormat(wanted.apply_chat_template, wanted.system_instruction, wanted.fewshot_as_multiturn),
        window=config.engine.max_model_len,
    )
    group = find_group(given.task)
    if group is None:
        return [spec]
    members = tuple(
        replace(spec, task=member.task, name=None, group_fewshot=member.num_fewshot) for member in group.members
    )
    check_one_split_each(f"task {given.task!r}", members)
    if not group.scores:
        if given.name is not None:
            raise EvaluationError(
                f"task {given.task!r} stands for {len(members)} tasks and has no score of its own, so it cannot be named {given.name!r}; "
                "leave out the name, or write a group file with aggregate_metric_list"
            )
        return list(members)
    metric, by_size = group.score(given.metric)
    members = tuple(
        replace(member, metric=metric, search_items=_of_each(wanted.search_items, len(members))) for member in members
    )
    return [replace(spec, name=given.name or group.name, members=members, weight_by_size=by_size)]


def _of_each(n_items: int | None, n_tasks: int) -> int | None:
    """The number of items per task of a group that gives about `n_items` in total; at least two, for an interval."""
    return None if n_items is None else max(2, round(n_items / n_tasks))
