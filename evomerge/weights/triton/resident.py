"""Sources in the GPU's memory: each tensor flat, padded with zeros to whole blocks, copied once and kept."""

import math
from collections.abc import Iterable

import torch

from evomerge.plan import TensorInput
from evomerge.weights.pool import WeightPool
from evomerge.weights.triton.kernels import BLOCK

Place = tuple[int, int, torch.dtype]
"""Address, size and dtype of a pool's tensor: models that differ by adapters share what those do not change."""

SPARE_BYTES = 256 << 20
"""left free for the tables and for what else runs on the GPU"""


class ResidentSources:
    """Copies of a pool's tensors on one device.

    Args:
        pool: the sources, on the CPU.
        device: where the copies are.
    """

    def __init__(self, pool: WeightPool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._copies: dict[Place, torch.Tensor] = {}

    def missing_bytes(self, entries: Iterable[TensorInput]) -> int:
        """Size of the copies that `hold` would make."""
        return sum(_padded(tensor.numel()) * tensor.element_size() for tensor in self._missing(entries).values())

    def free_bytes(self) -> float:
        """Room for copies; infinite on the CPU, where the interpreter's tests are small."""
        if self._device.type != "cuda":
            return math.inf
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return float(torch.cuda.mem_get_info(self._device)[0] + unused - SPARE_BYTES)

    def hold(self, entries: Iterable[TensorInput]) -> bool:
        """Copies what is not there yet; False where memory that looked free was not (in pieces, or taken meanwhile)."""
        for place, tensor in self._missing(entries).items():
            try:
                copy = torch.zeros(_padded(tensor.numel()), dtype=tensor.dtype, device=self._device)
            except torch.OutOfMemoryError:
                return False
            copy[: tensor.numel()].copy_(tensor.reshape(-1))
            self._copies[place] = copy
        return True

    def drop(self) -> None:
        """Frees all copies."""
        self._copies.clear()

    def tensor(self, entry: TensorInput) -> torch.Tensor:
        """The copy of a tensor that is held: flat, with zeros behind its last element."""
        return self._copies[_place(self._pool.tensor(entry.source, entry.tensor))]

    def _missing(self, entries: Iterable[TensorInput]) -> dict[Place, torch.Tensor]:
        tensors = (self._pool.tensor(entry.source, entry.tensor) for entry in entries)
        return {place: tensor for tensor in tensors if (place := _place(tensor)) not in self._copies}


def _place(tensor: torch.Tensor) -> Place:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def _padded(n_elements: int) -> int:
    return max(-(-n_elements // BLOCK), 1) * BLOCK
