"""Sources and ranks in the GPU's memory: each tensor flat, padded with zeros to whole blocks, copied once and kept."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.plan import TensorInput
from evomerge.weights.pool import WeightPool
from evomerge.weights.triton.kernels import BLOCK

Place = tuple[int, int, torch.dtype]
"""Address, size and dtype of a tensor of the CPU: models that differ by adapters share what those do not change."""

Item = TensorInput | NDArray[np.uint16]
"""What is copied: a tensor of the pool, or ranks, which must live as long as the pool."""

SPARE_BYTES = 256 << 20
"""left free for the tables and for what else runs on the GPU"""


class ResidentSources:
    """Copies of a pool's tensors, and of ranks, on one device.

    Args:
        pool: the sources, on the CPU.
        device: where the copies are.
        most_bytes: that they may take together; None = what is free.
    """

    def __init__(self, pool: WeightPool, device: torch.device, most_bytes: float | None = None) -> None:
        self._pool = pool
        self._device = device
        self._most_bytes = math.inf if most_bytes is None else most_bytes - SPARE_BYTES
        self._copies: dict[Place, torch.Tensor] = {}

    def missing_bytes(self, items: Iterable[Item]) -> int:
        """Size of the copies that `hold` would make."""
        return sum(_padded(tensor.numel()) * tensor.element_size() for tensor in self._missing(items).values())

    def free_bytes(self) -> float:
        """Room for more copies. On the CPU, where the interpreter's tests are small, everything is free."""
        allowed = self._most_bytes - sum(copy.nbytes for copy in self._copies.values())
        if self._device.type != "cuda":
            return allowed
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return min(allowed, float(torch.cuda.mem_get_info(self._device)[0] + unused - SPARE_BYTES))

    def hold(self, items: Iterable[Item]) -> bool:
        """Copies what is not there yet; False where memory that looked free was not (in pieces, or taken meanwhile)."""
        for place, tensor in self._missing(items).items():
            try:
                copy = torch.zeros(_padded(tensor.numel()), dtype=tensor.dtype, device=self._device)
            except torch.OutOfMemoryError:
                return False
            copy[: tensor.numel()].copy_(tensor.reshape(-1))
            self._copies[place] = copy
        return True

    def drop(self) -> None:
        """Frees all copies; their memory goes back to the GPU, for whoever else has use for it."""
        self._copies.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def tensor(self, item: Item) -> torch.Tensor:
        """The copy of what is held: flat, with zeros behind its last element; ranks as int16 with their bits."""
        return self._copies[_place(self._on_cpu(item))]

    def _missing(self, items: Iterable[Item]) -> dict[Place, torch.Tensor]:
        tensors = map(self._on_cpu, items)
        return {place: tensor for tensor in tensors if (place := _place(tensor)) not in self._copies}

    def _on_cpu(self, item: Item) -> torch.Tensor:
        if isinstance(item, np.ndarray):
            return torch.from_numpy(item.view(np.int16))
        return self._pool.tensor(*item.key)


def _place(tensor: torch.Tensor) -> Place:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def _padded(n_elements: int) -> int:
    return max(-(-n_elements // BLOCK), 1) * BLOCK
