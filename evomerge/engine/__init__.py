"""Inference engines whose weights are replaced in place, and every patch of third-party engine code.

Importing this package imports neither torch nor vLLM; `make_engine` does.
"""

import importlib.util
from collections.abc import Mapping
from pkgutil import resolve_name
from types import MappingProxyType

from evomerge.core import EngineError, FilePath, Json, did_you_mean
from evomerge.engine.base import Engine, GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest, RemoteWrite
from evomerge.engine.environment import engine_environment, vllm_targets_cpu
from evomerge.engine.gpu_memory import MemoryNeeds, source_room, vllm_memory_options
from evomerge.engine.vllm_options import vllm_option_names, vllm_options_refused

ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "evomerge.engine.vllm_engine:VllmEngine",
        "transformers": "evomerge.engine.transformers_engine:TransformersEngine",
    }
)
"""Kind of engine -> import path of its class, which is imported when the engine starts and called with (model, *, dtype, max_model_len, options)."""


def available_engines() -> tuple[str, ...]:
    """The kinds whose package is installed. Cheap: nothing is imported."""
    return tuple(kind for kind in ENGINES if importlib.util.find_spec(kind) is not None)


def default_engine_kind() -> str:
    """`vllm` where it is installed, else `transformers`."""
    return "vllm" if "vllm" in available_engines() else "transformers"


def make_engine(
    kind: str,
    model: FilePath,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    options: Mapping[str, Json] | None = None,
) -> Engine:
    """Start an engine; imports torch, and vLLM where `kind` says so.

    Args:
        kind: a key of `ENGINES`.
        model: Hugging Face folder that gives the architecture, the tokenizer and the first weights.
        dtype: what the engine computes in; "auto" = float32 on a CPU, the checkpoint's on an accelerator.
        max_model_len: longest sequence in tokens; None = the model's.
        options: passed on to the engine unchanged.

    Raises:
        EngineError: `kind` is unknown, its package is not installed, or it cannot serve the model.
    """
    if kind not in ENGINES:
        raise EngineError(f"unknown engine {kind!r}{did_you_mean(kind, ENGINES)} Known: {', '.join(ENGINES)}")
    if kind not in available_engines():
        raise EngineError(
            f"engine {kind!r}: the package {kind} is not installed; available: {', '.join(available_engines())}"
        )
    engine: Engine = resolve_name(ENGINES[kind])(model, dtype=dtype, max_model_len=max_model_len, options=options or {})
    return engine


def computes_on_cpu(kind: str) -> bool:
    """Whether an engine of this kind would compute on a CPU here."""
    if kind == "vllm":
        return vllm_targets_cpu()
    import torch

    return not torch.cuda.is_available()


__all__ = [
    "ENGINES",
    "Engine",
    "GenerateRequest",
    "Generation",
    "LogLikelihood",
    "LogLikelihoodRequest",
    "MemoryNeeds",
    "RemoteWrite",
    "available_engines",
    "computes_on_cpu",
    "default_engine_kind",
    "engine_environment",
    "make_engine",
    "source_room",
    "vllm_memory_options",
    "vllm_option_names",
    "vllm_options_refused",
]
