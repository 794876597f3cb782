"""Which engines start on this machine, so that the tests of others are skipped."""

from functools import cache

from evomerge.core import Json
from evomerge.engine import available_engines
from evomerge.engine.environment import vllm_targets_cpu


@cache
def cannot_start(kind: str, n_processes: int = 1) -> str:
    """Why no engine of this kind starts here, over so many processes, as the reason of a skipped test; empty where one does.

    Imports torch where the installed vLLM is for GPUs.
    """
    if kind not in available_engines():
        return f"{kind} is not installed"
    if kind == "vllm" and not vllm_targets_cpu():
        import torch

        if torch.accelerator.device_count() < n_processes:
            return f"the installed vLLM is for GPUs, of which this machine has {torch.accelerator.device_count()}"
    return ""


def options_beside_others(kind: str) -> dict[str, Json]:
    """With which several engines for tiny models run on one GPU at a time, where they run on one: vLLM takes nearly all of it otherwise."""
    return {"gpu_memory_utilization": 0.1} if kind == "vllm" and not vllm_targets_cpu() else {}
