"""Merging on a GPU: the steps of `evomerge.weights.fused.steps` as Triton kernels. triton is imported only where there is a GPU."""

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from evomerge.weights.fused.steps import fused_methods
from evomerge.weights.pool import WeightPool

if TYPE_CHECKING:
    from evomerge.weights.triton.batch import TritonBatch

logger = logging.getLogger(__name__)

INTERPRET = "TRITON_INTERPRET"
"""Triton's variable that makes kernels run in Python, on tensors of the CPU"""


def gpu_methods() -> tuple[str, ...]:
    """Methods that are computed where the engine's weights are, on a GPU; none without triton."""
    return fused_methods() if find_spec("triton") else ()


def triton_batch(pool: WeightPool, device: torch.device) -> "TritonBatch | None":
    """What merges into tensors on `device`; None where that is the CPU's work or triton is not installed (which is logged)."""
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get(INTERPRET) == "1"):
        return None
    if find_spec("triton") is None:
        logger.warning(
            "merging on the CPU and copying to %s: triton is not installed (requirements/gpu.txt has it)", device
        )
        return None
    from evomerge.weights.triton.batch import TritonBatch

    return TritonBatch(pool, device)
