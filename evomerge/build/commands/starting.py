"""Writes a first configuration for given models, with a comment on every choice."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from evomerge.build.commands.given_models import (
    parse_model,
    path_from,
    relative_to,
    resolve_hub_models,
    sources_by_name,
)
from evomerge.build.problem import make_problem
from evomerge.config import parse_config
from evomerge.core import ConfigError, FilePath, atomic_write_text, load_yaml
from evomerge.evaluation.task_groups import find_task
from evomerge.plan import ModelHeader, read_source
from evomerge.recipe import Source
from evomerge.strategy import strategy_names

_TEMPLATE = """\
# Made by `evomerge init`. Next: `evomerge validate --items {file}`, `evomerge plan {file}`, `evomerge search {file}`.
# Paths are relative to this file. `evomerge validate --show {file}` prints every setting with its value; docs/configuration.md explains them.

models:                       # {architecture}, {n_layers} layers
{models}

method: {method}{method_note}

# What the merged model should be good at: lm-eval task files or task names. Each task needs three disjoint splits: search (guides the
# search), select (ranks the finalists), report (scored once, at the end). Where the data's splits have other names, map them:
#   - {{task: mine.yaml, splits: {{search: train, select: validation, report: test}}}}      # or parts of one: 'train[:60%]', ...
{tasks}

# auto: cma_es for one objective; map or cycleqd for the trade-offs between several (`evomerge validate` says which).
# To search for the best mean of several, set cma_es. All: {strategies}
strategy: auto

budget: {{evaluations: 200}}    # also: items, hours; to search further: `evomerge resume RUN --set budget.evaluations=400`
seed: 0

# objectives: [mine, cost.generated_tokens]   # default: every task; also costs, e.g. the tokens that answers take
# baselines: {{recipes: [mine.yml]}}            # your own recipes (mergekit's too) to start from and compare with
# evaluation: {{search_items: 50}}              # score candidates on this many random items of each task: more candidates in the same time
# evaluation: {{apply_chat_template: true}}     # for chat models; also: system_instruction
# engine: {{max_model_len: 2048}}               # longest prompt plus answer in tokens; default: the model's
# cluster: {{workers: 4, gpus_per_worker: 1}}   # default: one worker per GPU, or without GPUs per CPU core
# space: {{layer_groups: 4}}                    # more parameters: separate ones for each quarter of the layers
"""

_NO_TASKS = "tasks: []                     # add at least one"


def write_first_config(
    out: FilePath, experts: Sequence[str], *, base: FilePath | None, tasks: Sequence[str], overwrite: bool = False
) -> list[str]:
    """Write a commented configuration and return what is left to do, one line each; first what must be fixed in it.

    Args:
        out: the file.
        experts: folders of models, as `path` or `name=path`; `path+lora` is a model with an adapter.
        base: the model they were all trained from.
        tasks: lm-eval task files or names.
        overwrite: replace `out` if it exists.

    Raises:
        ConfigError: `out` exists, a name of an expert is invalid or appears twice, or a task is missing.
        CheckpointError: a model cannot be read.
    """
    out = Path(out)
    refuse_existing(out, overwrite=overwrite)
    sources = sources_by_name([parse_model(expert) for expert in experts])
    if not sources:
        raise ConfigError("give the models to merge: evomerge init MODEL MODEL, or MODEL --base MODEL")
    if base is None and len(sources) < 2:
        raise ConfigError("one model alone cannot be merged; give at least two, or one and its --base")
    header, *_ = [
        read_source(resolve_hub_models(source))
        for source in ([Source(str(base))] if base else []) + list(sources.values())
    ]
    folder = out.resolve().parent
    local = [_scalar(path_from(task, folder)) if task.endswith((".yaml", ".yml")) else task for task in tasks]
    for task in tasks:
        find_task(task)
    return write_config(out, _text(out, header, folder, sources, base, local))


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise ConfigError if `out` exists and must not be replaced."""
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} already exists; choose another --out, or use --overwrite")


def write_config(out: Path, text: str) -> list[str]:
    """Write a configuration and return what is left to do, one line each; first what must be fixed in it.

    Raises:
        ConfigError: the configuration is invalid, or cannot be written.
    """
    folder, file = out.resolve().parent, shlex.quote(str(out))
    settings = load_yaml(text, str(out))
    config = parse_config({**settings, "tasks": settings["tasks"] or ["to-be-named"]}, folder=folder, where=str(out))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"{folder}: cannot be created: {problem.strerror}") from None
    try:
        atomic_write_text(out, text)
    except OSError as problem:
        raise ConfigError(f"{out}: cannot be written: {problem.strerror}") from None
    if not settings["tasks"]:
        return [f"add tasks in {out}", f"evomerge validate {file}"]
    try:
        make_problem(config)
    except ConfigError as problem:
        return [str(problem), f"fix this in {out}", f"evomerge validate {file}"]
    return [f"evomerge search {file}"]


def _text(
    out: Path,
    header: ModelHeader,
    folder: Path,
    experts: Mapping[str, Source],
    base: FilePath | None,
    tasks: Sequence[str],
) -> str:
    """The text of the configuration; `header` is that of its first model, `folder` that of the file."""
    models = [f"  base: {_scalar(relative_to(folder, Source(str(base))))}"] if base else []
    models += [
        "  experts:",
        *(f"    {_scalar(name)}: {_scalar(relative_to(folder, source))}" for name, source in experts.items()),
    ]
    return _TEMPLATE.format(
        file=shlex.quote(str(out)),
        architecture=header.architecture,
        n_layers=header.n_layers,
        models="\n".join(models),
        method="task_arithmetic" if base else "linear",
        method_note="       # base + weighted differences of the experts from it; with a list, [task_arithmetic, ties], the search chooses" if base else "                # weighted mean; methods with task vectors need a base",
        tasks="tasks:\n" + "\n".join(f"  - {task}" for task in tasks) if tasks else _NO_TASKS,
        strategies=", ".join(strategy_names()),
    )  # fmt: skip


def _scalar(text: str) -> str:
    """`text` as a YAML scalar, quoted only if necessary."""
    is_plain = re.fullmatch(r"[\w./-]+", text) and load_yaml(text, "") == text
    return text if is_plain else json.dumps(text, ensure_ascii=not text.isprintable())
