"""config -> the evaluator of a worker. Runs in the worker's process; `make_evaluator` is named by the pools as data."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

from evomerge.build.crossings import crosses_models
from evomerge.build.fingerprints import refuse_other_sources
from evomerge.build.items import load_tasks
from evomerge.build.problem import model_table
from evomerge.build.tasks import needed_splits
from evomerge.cluster import Evaluator
from evomerge.config import SearchConfig, SyntheticConfig
from evomerge.core import ConfigError, Json, Split
from evomerge.plan import MergePlan, ModelHeader, ModelTable, folding_of, padded, rank_bytes, read_models
from evomerge.recipe import PIECEWISE

if TYPE_CHECKING:
    from evomerge.engine import Engine
    from evomerge.evaluation import LmEvalEvaluator, TaskSet

FACTORY = "evomerge.build.evaluators:make_evaluator"


def make_evaluator(settings: Mapping[str, Json]) -> Evaluator:
    """The evaluator that `evaluator_settings` describes.

    Raises:
        EvomergeError: a model, a task or the engine cannot be loaded.
    """
    config = SearchConfig.model_validate(settings["config"])
    wanted = config.evaluation
    if isinstance(wanted, SyntheticConfig):
        return _synthetic(wanted, config.seed)
    models = read_models(cast(ModelTable, settings["models"]))
    marks = cast(Mapping[str, Mapping[str, str]] | None, settings["marks"])
    if marks is not None:
        refuse_other_sources(marks, config, models)
    first, splits = next(iter(models.values())), [Split(name) for name in cast(list[str], settings["splits"])]
    with ExitStack() as stack:
        # before the engine, which takes minutes where these take seconds and may have something wrong
        tasks = load_tasks(config, wanted, first, splits, code_processes=_cpus(config))
        stack.callback(tasks.close)
        evaluator = _lm_eval(
            config, tasks, models, cast(int | None, settings["n_slots"]), str(settings["method"]), stack
        )
        stack.pop_all()
    return evaluator


def evaluator_settings(
    config: SearchConfig,
    models: ModelTable | None = None,
    n_slots: int | None = None,
    splits: Sequence[Split] | None = None,
    method: str | None = None,
    marks: Mapping[str, Json] | None = None,
) -> dict[str, Json]:
    """What `make_evaluator` needs, as JSON.

    Args:
        config: the configuration.
        models: those that recipes may name, the one that lends its tokenizer first; default: the config's.
        n_slots: layers that the engine has room for; None = the models'.
        splits: whose items every task must have; None = those that a search looks at.
        method: of the recipes; None = the config's.
        marks: `source_marks`, which the models and tasks must have where the evaluator is made; None = any.
    """
    return {
        "config": config.model_dump(mode="json"),
        "models": {key: list(place) for key, place in (models or model_table(config)).items()},
        "n_slots": n_slots,
        "method": method or merge_method(config),
        "marks": None if marks is None else dict(marks),
        "splits": [split.value for split in (needed_splits(config) if splits is None else splits)],
    }


def engine_kind(config: SearchConfig) -> str:
    """The engine that "auto" means on this machine."""
    from evomerge.engine import default_engine_kind

    return default_engine_kind() if config.engine.kind == "auto" else config.engine.kind


def worker_environment(config: SearchConfig) -> dict[str, str]:
    """Variables that must be set before a worker's Python starts."""
    if isinstance(config.evaluation, SyntheticConfig):
        return {}
    from evomerge.engine import engine_environment

    return engine_environment(engine_kind(config), threads=_cpus(config))


def _cpus(config: SearchConfig) -> int:
    """Cores that a worker has to itself."""
    return max(1, int(config.cluster.cpus_per_worker))


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
    method: str,
    stack: ExitStack,
) -> "LmEvalEvaluator":
    """An evaluator with a running engine; `stack` closes what has been started."""
    from evomerge.engine import source_room
    from evomerge.evaluation import LmEvalEvaluator
    from evomerge.weights import Merger, WeightPool

    pool = WeightPool(headers)
    first = next(iter(headers.values()))
    needs = gpu_memory_needs(config, headers, n_slots, method)
    options = _engine_options(config, needs)
    engine = _engine(config, first, n_slots, options)
    stack.callback(engine.close)
    gpu_bytes = source_room(options, gpus=needs["gpus"]) if engine_kind(config) == "vllm" else None

    def fit(plan: MergePlan) -> MergePlan:
        if n_slots is None or plan.n_layers == n_slots:
            return plan
        return padded(plan, n_slots, folding_of(first).silenced)

    return LmEvalEvaluator(engine, Merger(pool, gpu_bytes=gpu_bytes), headers, tasks, fit=fit)


_SAYS_MEMORY = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
"""options of vLLM with which a user says himself what it may take"""


def gpu_memory_needs(
    config: SearchConfig, models: Mapping[str, ModelHeader], n_slots: int | None, method: str
) -> dict[str, float]:
    """What an engine and its merges need of each of its GPUs: the arguments of `vllm_memory_options`.

    Args:
        config: the configuration.
        models: those that recipes may name, the one that is served first.
        n_slots: layers that the engine has room for; None = the model's.
        method: that they are merged by.
    """
    from evomerge.weights import gpu_methods

    model, processes = next(iter(models.values())), config.engine.tensor_parallel
    on_gpu = method == PIECEWISE.name or method in gpu_methods()
    depth = n_slots / model.n_layers if n_slots and model.n_layers else 1.0
    given = config.cluster.gpus_per_worker
    return {
        "engine_bytes": model.n_bytes * depth / processes,
        "source_bytes": sum(header.n_bytes for header in models.values()) + ranks_of(method, models) if on_gpu else 0,
        "gpus": 1.0 if given is None else given / processes,
    }


def merge_method(config: SearchConfig) -> str:
    """What a search merges its models by."""
    return PIECEWISE.name if crosses_models(config) else config.space.method


def ranks_of(method: str, models: Mapping[str, ModelHeader]) -> int:
    """Bytes of the ranks that merges by `method` keep, in the CPU's memory and again in that of a GPU that merges by it.

    Args:
        method: of the merges.
        models: those that recipes may name, the base first.
    """
    return rank_bytes(method, list(models.values())[1:])


def _engine_options(config: SearchConfig, needs: Mapping[str, float]) -> dict[str, Json]:
    """The configuration's, with vLLM's share of the GPU where they do not say it."""
    from evomerge.engine import vllm_memory_options

    options = dict(config.engine.options)
    if engine_kind(config) == "vllm" and not _SAYS_MEMORY & options.keys():
        options |= vllm_memory_options(**needs)
    return options


def _engine(config: SearchConfig, model: ModelHeader, n_slots: int | None, options: dict[str, Json]) -> "Engine":
    """An engine for models like `model`; with `n_slots` layers, where that is another number."""
    from evomerge.engine import make_engine
    from evomerge.weights import write_slots_folder

    wanted, kind = config.engine, engine_kind(config)
    if wanted.tensor_parallel > 1:
        if kind != "vllm":
            raise ConfigError(
                f"engine.tensor_parallel: {wanted.tensor_parallel} needs vLLM, and the engine here is {kind}"
            )
        if n_slots not in (None, model.n_layers):
            raise ConfigError(
                "engine.tensor_parallel: an engine with slots for layers is one process; use more workers instead"
            )
        options = options | {"tensor_parallel_size": wanted.tensor_parallel}

    def start(folder: Path) -> "Engine":
        return make_engine(kind, folder, dtype=wanted.dtype, max_model_len=wanted.max_model_len, options=options)

    if n_slots is None or n_slots == model.n_layers:
        return start(model.folder)
    with TemporaryDirectory(prefix="evomerge-slots-") as folder:
        write_slots_folder(Path(folder), model, n_slots)
        return start(Path(folder))
