"""Which engines start on this machine, so that the tests of others are skipped."""

from functools import cache

from evomerge.engine import available_engines
from evomerge.engine.environment import vllm_targets_cpu


@cache
def cannot_start(kind: str) -> str:
    """Why no engine of this kind starts here, as the reason of a skipped test; empty where one does.

    Imports torch where the installed vLLM is for GPUs.
    """
    if kind not in available_engines():
        return f"{kind} is not installed"
    if kind == "vllm" and not vllm_targets_cpu():
        import torch

        if not torch.accelerator.is_available():
            return "the installed vLLM is for GPUs, and this machine has none"
    return ""
