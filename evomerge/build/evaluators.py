"""config -> the evaluator of a worker. Runs in the worker's process; pools refer to `make_evaluator` by its name."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from evomerge.build.engines import (
    cpus_per_worker,
    engine_kind,
    engine_options,
    gpu_memory_needs,
    merge_methods,
    start_engine,
)
from evomerge.build.fingerprints import refuse_other_sources
from evomerge.build.items import load_tasks
from evomerge.build.sources import model_table
from evomerge.build.tasks import needed_splits
from evomerge.cluster import Evaluator
from evomerge.config import SearchConfig, SyntheticConfig
from evomerge.core import Json, Split
from evomerge.core.settings import Settings
from evomerge.plan import MergePlan, ModelHeader, ModelTable, folding_of, padded, read_models

if TYPE_CHECKING:
    from evomerge.evaluation import LmEvalEvaluator, TaskSet

FACTORY = "evomerge.build.evaluators:make_evaluator"


class WorkerSettings(Settings):
    """What a worker needs to make its evaluator; travels to it as JSON."""

    config: SearchConfig
    models: dict[str, tuple[str, str | None]]
    """name in recipes -> folder, and folder of its adapter; the first provides the tokenizer"""
    n_slots: int | None
    """number of layers that the engine has room for; None = as many as the models have"""
    methods: tuple[str, ...]
    """merge methods of the recipes"""
    splits: tuple[Split, ...]
    """splits that every task must have items of"""
    marks: dict[str, dict[str, str]] | None
    """`source_marks` that the models and tasks must have on the machine of the worker; None = not checked"""


def make_evaluator(settings: Mapping[str, Json]) -> Evaluator:
    """Make the evaluator that `evaluator_settings` describes.

    Raises:
        EvomergeError: a model, a task or the engine cannot be loaded.
    """
    given = WorkerSettings.model_validate(settings)
    config, wanted = given.config, given.config.evaluation
    if isinstance(wanted, SyntheticConfig):
        return _synthetic(wanted, config.seed)
    models = read_models(given.models)
    if given.marks is not None:
        refuse_other_sources(given.marks, config, models)
    first = next(iter(models.values()))
    with ExitStack() as stack:
        # before the engine: this takes seconds and may fail, the engine takes minutes
        tasks = load_tasks(config, wanted, first, given.splits, code_processes=cpus_per_worker(config))
        stack.callback(tasks.close)
        evaluator = _lm_eval(config, tasks, models, given.n_slots, given.methods, stack)
        stack.pop_all()
    return evaluator


def evaluator_settings(
    config: SearchConfig,
    models: ModelTable | None = None,
    n_slots: int | None = None,
    splits: Sequence[Split] | None = None,
    methods: tuple[str, ...] | None = None,
    marks: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Json]:
    """`WorkerSettings` as JSON; by default with the models and methods of the config, and the splits that a search uses."""
    settings = WorkerSettings(
        config=config,
        models=dict(models or model_table(config)),
        n_slots=n_slots,
        methods=methods or merge_methods(config),
        splits=tuple(needed_splits(config) if splits is None else splits),
        marks=None if marks is None else {kind: dict(of_kind) for kind, of_kind in marks.items()},
    )
    return settings.model_dump(mode="json")


def _synthetic(wanted: SyntheticConfig, seed: int) -> Evaluator:
    from evomerge.evaluation.synthetic import SyntheticEvaluator

    return SyntheticEvaluator(
        wanted.function,
        n_items=wanted.n_items,
        item_noise=wanted.item_noise,
        delay_s=wanted.delay_s,
        failure_rate=wanted.failure_rate,
        seed=seed,
    )


def _lm_eval(
    config: SearchConfig,
    tasks: "TaskSet",
    headers: Mapping[str, ModelHeader],
    n_slots: int | None,
    methods: tuple[str, ...],
    stack: ExitStack,
) -> "LmEvalEvaluator":
    """Make an evaluator with a running engine, which `stack` closes on failure."""
    from evomerge.engine import source_room
    from evomerge.evaluation import LmEvalEvaluator
    from evomerge.weights import Merger, WeightPool

    pool = WeightPool(headers)
    first = next(iter(headers.values()))
    needs = gpu_memory_needs(config, headers, n_slots, methods)
    options = engine_options(config, needs)
    gpu_bytes = source_room(options, gpus=needs.gpus) if engine_kind(config) == "vllm" else None
    # before the engine, which on a GPU sets torch to one thread: the merger takes its number of threads from torch
    merger = Merger(pool, gpu_bytes=gpu_bytes)
    engine = start_engine(config, first, n_slots, options)
    stack.callback(engine.close)

    def fit(plan: MergePlan) -> MergePlan:
        if n_slots is None or plan.n_layers == n_slots:
            return plan
        return padded(plan, n_slots, folding_of(first).silenced)

    return LmEvalEvaluator(engine, merger, headers, tasks, fit=fit)
