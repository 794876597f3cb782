"""The tasks of a configuration: their names, and whether they have the items that a search needs. Loads no data."""

from pathlib import Path

from evomerge.config import SearchConfig, SyntheticConfig, TaskConfig
from evomerge.core import EvomergeError, Split
from evomerge.evaluation import PromptFormat, TaskSpec
from evomerge.evaluation.task_files import check_task, is_task_file, read_task_file, task_name


def task_specs(config: SearchConfig) -> list[TaskSpec]:
    """The tasks as the evaluator takes them.

    Raises:
        EvaluationError: one part of a data set is to serve as several splits.
    """
    if isinstance(config.evaluation, SyntheticConfig):
        return []
    wanted = config.evaluation
    prompt = PromptFormat(wanted.apply_chat_template, wanted.system_instruction, wanted.fewshot_as_multiturn)
    return [
        TaskSpec(
            task=item.task,
            name=item.name,
            metric=item.metric,
            splits={Split(ours): theirs for ours, theirs in item.splits.items()},
            limit=item.limit,
            num_fewshot=item.num_fewshot,
            prompt=prompt,
        )
        for item in config.tasks
    ]


def needed_splits(config: SearchConfig) -> tuple[Split, ...]:
    """The splits that a search looks at: without finals only its own."""
    return tuple(Split) if config.finals.finalists else (Split.SEARCH,)


def lower_is_better(task: TaskConfig) -> bool:
    """Whether a local task file says so of the metric that is scored; False where it says nothing, and for tasks of lm-eval's own.

    Raises:
        EvaluationError: the file cannot be read.
    """
    if not is_task_file(task.task):
        return False
    rows = read_task_file(Path(task.task), functions_as_text=True).get("metric_list") or []
    rows = [row for row in rows if isinstance(row, dict)]
    if task.metric is not None:
        rows = [row for row in rows if row.get("metric") == task.metric.partition(",")[0]]
    means = [row for row in rows if row.get("aggregation", "mean") == "mean"]
    return (means or rows or [{}])[0].get("higher_is_better") is False


def checked_task_names(config: SearchConfig) -> tuple[tuple[str, ...], list[str]]:
    """The names of the scores, and everything that is wrong with the tasks as far as it can be told without loading them."""
    names: list[str] = []
    errors: list[str] = []
    try:
        specs = task_specs(config)
    except EvomergeError as error:
        return (), [str(error)]
    for spec in specs:
        try:
            check_task(spec, needed_splits(config))
            names.append(spec.name or task_name(spec.task))
        except EvomergeError as error:
            errors.append(str(error))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        errors.append(f"tasks: {', '.join(twice)} stands twice; give each a name of its own")
    return tuple(names), errors
