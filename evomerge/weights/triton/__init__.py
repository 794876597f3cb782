"""Merging on a GPU: the steps of `evomerge.weights.fused.steps` as Triton kernels. triton is imported only where there is a GPU."""

import logging
import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from evomerge.weights.fused.steps import CPU_ONLY, fused_methods
from evomerge.weights.pool import WeightPool

if TYPE_CHECKING:
    from evomerge.weights.triton.batch import TritonBatch

logger = logging.getLogger(__name__)

INTERPRET = "TRITON_INTERPRET"
"""Triton's variable that makes kernels run in Python, on tensors of the CPU"""


def missing() -> str | None:
    """What the kernels lack on this machine, whatever GPU it has, and what to do; None where they lack nothing."""
    if find_spec("triton") is None:
        return "triton is not installed (requirements/gpu.txt has it)"
    named = os.environ.get("CC")  # as triton looks for one, to build what starts its kernels
    if os.environ.get(INTERPRET) != "1" and not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        return "triton needs a C compiler and finds none: install gcc, or name one in CC"
    return None


def gpu_methods() -> tuple[str, ...]:
    """Methods that are computed where the engine's weights are, on a GPU; none where the kernels lack something."""
    return tuple(method for method in fused_methods() if method not in CPU_ONLY) if missing() is None else ()


def triton_batch(pool: WeightPool, device: torch.device, most_bytes: float | None = None) -> "TritonBatch | None":
    """What merges into tensors on `device`, of which its sources take `most_bytes`; see `TritonBatch`.

    None where that is the CPU's work or kernels do not run there (which is logged).
    """
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get(INTERPRET) == "1"):
        return None
    reason = missing()
    if reason is None:
        from evomerge.weights.triton.batch import TritonBatch, obstacle

        reason = obstacle(device)
        if reason is None:
            return TritonBatch(pool, device, most_bytes)
    logger.warning("merging on the CPU and copying to %s: %s", device, reason)
    return None
