"""Checks for a GPU and divides its memory between the engine and the source models of the merge. Knows nothing of merging."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from evomerge.core import EngineError, Json
from evomerge.engine.environment import vllm_targets_cpu

logger = logging.getLogger(__name__)

USABLE_SHARE = 0.92
"""vLLM's default for `gpu_memory_utilization`; the rest is left for the driver and for memory that torch cannot release."""
ENGINE_SPARE_BYTES = 4 << 30
"""What vLLM needs besides the weights: activations, CUDA graphs and the smallest useful key-value cache, for models of up to about 10B parameters."""
SOURCE_SPARE_BYTES = 1 << 30
"""What merging needs besides the source weights: tables, compiled kernels, allocator fragmentation."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What an engine and its merges need on each of its GPUs.

    Attributes:
        engine_bytes: weights of the served model on one GPU.
        source_bytes: models merged on the GPU, with the ranks that some methods need; 0 = they stay in CPU memory.
        gpus: number of GPUs assigned to each process of the engine; below 1, other engines share the GPU.
    """

    engine_bytes: float
    source_bytes: float
    gpus: float


def check_gpu() -> None:
    """Check that the installed vLLM has the hardware it is built for.

    Raises:
        EngineError: it is built for GPUs and finds none.
    """
    if vllm_targets_cpu():
        return
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        raise EngineError(
            "vLLM sees no GPU, and the installed build needs one: check the driver, CUDA_VISIBLE_DEVICES and the container's --gpus, "
            "or set engine.kind: transformers (`evomerge doctor` lists the hardware it finds)"
        )


def vllm_memory_options(needs: MemoryNeeds) -> dict[str, Json]:
    """Options of `VllmEngine` for this process's first GPU; none with a CPU build.

    Raises:
        EngineError: there is no GPU.
    """
    if vllm_targets_cpu():
        return {}
    check_gpu()
    from vllm.platforms import current_platform

    total = int(current_platform.get_device_total_memory())
    return {"gpu_memory_utilization": memory_share(total, needs)}


def source_room(options: Mapping[str, Json], *, gpus: float) -> float | None:
    """Bytes of this process's first GPU that vLLM with these `options` never uses; more may look free until it computes.

    None if unknown: with a CPU build, or if `kv_cache_memory_bytes` replaces vLLM's share of the memory.

    Raises:
        EngineError: there is no GPU.
    """
    if vllm_targets_cpu() or options.get("kv_cache_memory_bytes") is not None:
        return None
    check_gpu()
    from vllm.platforms import current_platform

    share = cast(float, options.get("gpu_memory_utilization", USABLE_SHARE))
    return room_beside(int(current_platform.get_device_total_memory()), share=share, gpus=gpus)


def room_beside(total_bytes: int, *, share: float, gpus: float) -> float:
    """Bytes left in a worker's part (`gpus`) of a GPU of `total_bytes` when vLLM takes `share` of the whole GPU."""
    return max(0.0, (min(1.0, gpus or 1.0) - share) * total_bytes)


def memory_share(total_bytes: int, needs: MemoryNeeds) -> float:
    """The share of a GPU of `total_bytes` that vLLM may take, in (0, 1].

    The usable memory minus the sources if that leaves enough for the engine. Otherwise all usable memory, with a warning:
    candidates can be merged on the CPU instead.
    """
    usable = USABLE_SHARE * total_bytes * min(1.0, needs.gpus or 1.0)
    left = usable - (needs.source_bytes + SOURCE_SPARE_BYTES if needs.source_bytes else 0)
    if left < needs.engine_bytes + ENGINE_SPARE_BYTES:
        if needs.source_bytes:
            logger.warning(
                "candidates will be merged on the CPU: %.1f GB of models (and ranks, for della methods) do not fit beside an "
                "engine of %.1f GB in %.1f GB of GPU memory; use fewer models or a larger GPU, or set engine.options.gpu_memory_utilization yourself",
                needs.source_bytes / 1e9,
                needs.engine_bytes / 1e9,
                usable / 1e9,
            )
        left = usable
    return left / total_bytes
