"""Which engines can start on this machine, so that the tests of others can be skipped."""

from functools import cache

from evomerge.core import Json
from evomerge.engine import available_engines
from evomerge.engine.environment import vllm_targets_cpu


@cache
def cannot_start(kind: str, n_processes: int = 1) -> str:
    """The reason to skip tests because an engine of this kind with `n_processes` processes cannot start here; empty if it can.

    Imports torch if the installed vLLM is built for GPUs.
    """
    if kind not in available_engines():
        return f"{kind} is not installed"
    if kind == "vllm" and not vllm_targets_cpu():
        import torch

        if torch.accelerator.device_count() < n_processes:
            return f"the installed vLLM needs {n_processes} GPU(s), but this machine has {torch.accelerator.device_count()}"
    return ""


def options_beside_others(kind: str) -> dict[str, Json]:
    """Options with which several engines for tiny models can share a GPU: by default, vLLM takes nearly all of its memory."""
    return {"gpu_memory_utilization": 0.1} if kind == "vllm" and not vllm_targets_cpu() else {}
