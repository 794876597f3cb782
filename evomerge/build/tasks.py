"""The tasks of a configuration by the names of their scores, and whether they have the items that a search needs. Loads no data."""

from dataclasses import replace

from evomerge.config import LmEvalConfig, SearchConfig, SyntheticConfig, TaskConfig
from evomerge.core import EvaluationError, EvomergeError, Split
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
    """The tasks and groups as the evaluator takes them: what has no score of its own (a tag) as the tasks it stands for.

    Raises:
        EvaluationError: one part of a data set is to serve as several splits, or a group cannot be used.
    """
    return [spec for item in config.tasks for spec in _specs(config, item)]


def needed_splits(config: SearchConfig) -> tuple[Split, ...]:
    """The splits that a search looks at: without finals only its own."""
    return tuple(Split) if config.finals.finalists else (Split.SEARCH,)


def checked_tasks(config: SearchConfig, *, begun: bool) -> tuple[dict[str, TaskSpec], list[str]]:
    """The name of every score -> its task, and everything that is wrong with the tasks as far as it can be told without loading them.

    Whether they may be searched on is not asked of a run that has `begun`.
    """
    tasks: dict[str, TaskSpec] = {}
    twice: dict[str, None] = {}
    errors: list[str] = []
    for item in config.tasks:
        try:
            for spec in _specs(config, item):
                _check(spec, config, on_test=item.search_on_test or begun)
                name = spec.name or task_name(spec.task)
                if name.startswith("cost."):
                    raise EvaluationError(f"tasks: {name!r} would be taken for a cost; give the task another name")
                if tasks.setdefault(name, spec) is not spec:
                    twice[name] = None
        except EvomergeError as error:
            errors.append(str(error))
    if twice:
        errors.append(f"tasks: {', '.join(twice)} appears twice; give each a name of its own")
    return tasks, errors


def _check(spec: TaskSpec, config: SearchConfig, *, on_test: bool) -> None:
    """Raises EvaluationError where a search cannot score the task; `on_test`: it may be searched on where its published scores are from."""
    trusted = not isinstance(config.evaluation, LmEvalConfig) or config.evaluation.trust_task_code
    for task in spec.tasks:
        if not on_test:
            check_not_scored_on(task)
    for task in spec.tasks:
        check_task(task, needed_splits(config))
        if not trusted:
            check_runs_nothing(task)
        # a group's number of examples is for those of its tasks that take any
        check_supported(replace(task, num_fewshot=None) if spec.members else task)
    check_metric(spec)
    for task in spec.tasks:
        check_splits(task, needed_splits(config))
        check_packages(task)


def _specs(config: SearchConfig, item: TaskConfig) -> list[TaskSpec]:
    wanted = config.evaluation
    if isinstance(wanted, SyntheticConfig):
        return []
    spec = TaskSpec(
        task=item.task,
        name=item.name,
        metric=item.metric,
        splits={Split(ours): theirs for ours, theirs in item.splits.items()},
        limit=item.limit,
        search_items=wanted.search_items,
        seed=config.seed,
        num_fewshot=item.num_fewshot,
        drop_shared=item.drop_shared,
        prompt=PromptFormat(wanted.apply_chat_template, wanted.system_instruction, wanted.fewshot_as_multiturn),
        window=config.engine.max_model_len,
    )
    group = find_group(item.task)
    if group is None:
        return [spec]
    members = tuple(
        replace(spec, task=member.task, name=None, group_fewshot=member.num_fewshot) for member in group.members
    )
    check_one_split_each(f"task {item.task!r}", members)
    if not group.scores:
        if item.name is not None:
            raise EvaluationError(
                f"task {item.task!r} stands for {len(members)} tasks and has no score of its own, so it cannot be called {item.name!r}; "
                "leave the name out, or write a group file with aggregate_metric_list"
            )
        return list(members)
    metric, by_size = group.score(item.metric)
    members = tuple(
        replace(member, metric=metric, search_items=_of_each(wanted.search_items, len(members))) for member in members
    )
    return [replace(spec, name=item.name or group.name, members=members, weight_by_size=by_size)]


def _of_each(n_items: int | None, n_tasks: int) -> int | None:
    """How many items of each task of a group make about `n_items` of all; two at least, for an interval."""
    return None if n_items is None else max(2, round(n_items / n_tasks))
