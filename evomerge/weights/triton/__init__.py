"""Merging on a GPU: the steps of `evomerge.weights.fused.steps` as Triton kernels. triton is imported only if there is a GPU."""

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
"""Triton's environment variable that makes kernels run in Python, on CPU tensors"""


def missing() -> str | None:
    """What the kernels lack on this machine, apart from a suitable GPU, and what to do; None if they lack nothing."""
    if find_spec("triton") is None:
        return "triton is not installed (requirements/gpu.txt has it)"
    named = os.environ.get("CC")  # triton looks here for a compiler, with which it builds kernel launchers
    if os.environ.get(INTERPRET) != "1" and not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        return "triton needs a C compiler but finds none: install gcc, or set CC to one"
    return None


def gpu_methods() -> tuple[str, ...]:
    """Methods that can be computed on the GPU that holds the engine's weights; none if the kernels lack something."""
    return tuple(method for method in fused_methods() if method not in CPU_ONLY) if missing() is None else ()


def triton_batch(pool: WeightPool, device: torch.device, most_bytes: float | None = None) -> "TritonBatch | None":
    """A batch that merges into tensors on `device`, where its sources may take `most_bytes`; see `TritonBatch`.

    None if merging is done on the CPU, or if kernels do not run on the device (which is logged).
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
