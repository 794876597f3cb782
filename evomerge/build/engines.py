"""config -> the engine of a worker: its kind, environment and memory, and the memory that merges need in addition."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from evomerge.build.crossings import crosses_models
from evomerge.config import SearchConfig, SyntheticConfig
from evomerge.core import ConfigError, Json, did_you_mean
from evomerge.plan import DTYPE_BYTES, ModelHeader, config_value, default_dtype, rank_bytes
from evomerge.recipe import PIECEWISE

if TYPE_CHECKING:
    from evomerge.engine import Engine, MemoryNeeds

_REPLICATED = 1.05
"""With several processes, each holds its share of the models times this: norms are replicated, and so are keys and values if there are fewer heads
than processes."""

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""keys of config.json for the longest sequence that a model supports"""

_ALLOWED_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""an environment variable that makes vLLM accept longer sequences"""

_MEMORY_OPTIONS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
"""vLLM options with which users limit its memory themselves"""


def engine_kind(config: SearchConfig) -> str:
    """The engine that "auto" means on this machine."""
    from evomerge.engine import default_engine_kind

    return default_engine_kind() if config.engine.kind == "auto" else config.engine.kind


def check_engine_options(config: SearchConfig) -> None:
    """Raise ConfigError for `engine.options` that vLLM does not have or that evomerge does not allow.

    Only checked if vLLM is the engine; option names only if it is installed here.
    """
    from evomerge.engine import vllm_option_names, vllm_options_refused

    if not config.engine.options or engine_kind(config) != "vllm":
        return
    known = vllm_option_names()
    unknown = [name for name in config.engine.options if known and name not in known]
    wrong = [f"vLLM has no option {name!r}{did_you_mean(name, known)}" for name in unknown]
    wrong += vllm_options_refused(config.engine.options)
    if wrong:
        raise ConfigError(f"engine.options: {' '.join(wrong)}")


def worker_environment(config: SearchConfig) -> dict[str, str]:
    """Environment variables that must be set before a worker's Python starts."""
    if isinstance(config.evaluation, SyntheticConfig):
        return {}
    from evomerge.engine import engine_environment

    threads = max(1, cpus_per_worker(config) // config.engine.tensor_parallel)
    variables = engine_environment(engine_kind(config), threads=threads)
    if config.cluster.cpus_per_worker is not None:  # otherwise Ray, or torch, decides
        variables.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))
    return variables


def cpus_per_worker(config: SearchConfig) -> int:
    """CPU cores per worker: as configured, otherwise one."""
    return max(1, int(config.cluster.cpus_per_worker or 1))


def gpus_per_worker(config: SearchConfig) -> float:
    """GPUs per worker if there are GPUs: as configured, otherwise one for each process of its engine.

    Raises:
        ConfigError: there are fewer GPUs than processes, but not 0 (an engine on the CPU).
    """
    processes, wanted = config.engine.tensor_parallel, config.cluster.gpus_per_worker
    if wanted is None:
        return float(processes)
    if processes > 1 and 0 < wanted < processes:
        raise ConfigError(
            f"cluster.gpus_per_worker: {wanted:g} is too low for engine.tensor_parallel: {processes}; leave it out, or set it to {processes}"
        )
    return wanted


def engine_bytes(config: SearchConfig, weight_bytes: float, dtype: str) -> float:
    """The memory that the engine on this machine needs for weights of `weight_bytes` in `dtype`, which it holds in its compute dtype."""
    from evomerge.engine import computes_on_cpu

    held: str = config.engine.dtype
    if held == "auto":
        held = "float32" if computes_on_cpu(engine_kind(config)) else dtype
    return weight_bytes * DTYPE_BYTES[held] / DTYPE_BYTES[dtype]


def gpu_memory_needs(
    config: SearchConfig, models: Mapping[str, ModelHeader], n_slots: int | None, methods: tuple[str, ...]
) -> "MemoryNeeds":
    """What an engine and its merges need on each of its GPUs.

    Args:
        config: the configuration.
        models: the models that recipes may use; the first is the one that the engine serves.
        n_slots: number of layers that the engine has room for; None = as many as the model has.
        methods: merge methods of the recipes.
    """
    from evomerge.engine import MemoryNeeds
    from evomerge.weights import gpu_methods

    model, processes = next(iter(models.values())), config.engine.tensor_parallel
    on_gpu = tuple(method for method in methods if method == PIECEWISE.name or method in gpu_methods())
    depth = n_slots / model.n_layers if n_slots and model.n_layers else 1.0
    part = _REPLICATED / processes if processes > 1 else 1.0
    given = config.cluster.gpus_per_worker
    sources = sum(header.n_bytes for header in models.values()) + ranks_of(on_gpu, models)
    return MemoryNeeds(
        engine_bytes=engine_bytes(config, model.n_bytes * depth * part, default_dtype(model)),
        source_bytes=sources * part if on_gpu else 0,
        gpus=1.0 if given is None else given / processes,
    )


def check_length(config: SearchConfig, model: ModelHeader) -> None:
    """Raise ConfigError if `engine.max_model_len` exceeds the positions of `model`, since no engine would start then."""
    wanted, positions = config.engine.max_model_len, config_value(model.config, *POSITIONS)
    if wanted is None or not isinstance(positions, int) or wanted <= positions:
        return
    is_vllm = engine_kind(config) == "vllm"
    rope = config_value(model.config, "rope_scaling", "rope_parameters")
    # settings for all layers, or for each kind of layer
    rotary = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    # vLLM extends the positions in either case
    stretched = "model_max_length" in model.config or any(
        isinstance(settings, Mapping) and "factor" in settings for settings in rotary
    )
    allowed = os.environ.get(_ALLOWED_LONG, "0").strip().lower() in ("1", "true")
    if not is_vllm or not (stretched or "hf_overrides" in config.engine.options or allowed):
        raise ConfigError(
            f"engine.max_model_len: {wanted:,} is more than the {positions:,} positions that the config.json of {model.folder} allows; lower it"
        )


def merge_methods(config: SearchConfig) -> tuple[str, ...]:
    """The methods that a search merges models with."""
    return (PIECEWISE.name,) if crosses_models(config) else config.space.methods


def ranks_of(methods: tuple[str, ...], models: Mapping[str, ModelHeader]) -> int:
    """Size in bytes of the ranks that merges with `methods` keep: in CPU memory, and as much again in GPU memory if a GPU merges with them.

    Args:
        methods: merge methods.
        models: the models that recipes may use, the base first.
    """
    return rank_bytes(methods, list(models.values())[1:])


def engine_options(config: SearchConfig, needs: "MemoryNeeds") -> dict[str, Json]:
    """The configured engine options; for vLLM with its share of the GPU memory, unless they set that."""
    from evomerge.engine import vllm_memory_options

    options = dict(config.engine.options)
    if engine_kind(config) == "vllm" and not _MEMORY_OPTIONS & options.keys():
        options |= vllm_memory_options(needs)
    return options


def start_engine(config: SearchConfig, model: ModelHeader, n_slots: int | None, options: dict[str, Json]) -> "Engine":
    """Start an engine for models like `model`; with room for `n_slots` layers if that differs from the model's number."""
    from evomerge.engine import make_engine
    from evomerge.weights import write_slots_folder

    wanted, kind = config.engine, engine_kind(config)
    if wanted.tensor_parallel > 1:
        if kind != "vllm":
            raise ConfigError(
                f"engine.tensor_parallel: {wanted.tensor_parallel} needs vLLM, but the engine here is {kind}"
            )
        if n_slots not in (None, model.n_layers):
            raise ConfigError(
                "engine.tensor_parallel: an engine for stacked layers runs in one process; set it to 1, and use more workers instead"
            )
        options = options | {"tensor_parallel_size": wanted.tensor_parallel}

    def start(folder: Path) -> "Engine":
        return make_engine(kind, folder, dtype=wanted.dtype, max_model_len=wanted.max_model_len, options=options)

    if n_slots is None or n_slots == model.n_layers:
        return start(model.folder)
    with TemporaryDirectory(prefix="evomerge-slots-") as folder:
        write_slots_folder(Path(folder), model, n_slots)
        return start(Path(folder))
