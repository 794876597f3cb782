"""Sources and ranks in the GPU's memory: of each tensor what is merged there, flat, padded with zeros to whole blocks, copied once and kept."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.plan import TensorInput
from evomerge.weights.pool import WeightPool
from evomerge.weights.triton.kernels import BLOCK
from evomerge.weights.windows import Window

Place = tuple[int, torch.dtype, Window]
"""Address and dtype of a tensor of the CPU, and what of it: models that differ by adapters share what those do not change."""

Source = TensorInput | NDArray[np.uint16]
"""A tensor of the pool, or ranks, which must live as long as the pool."""

Item = tuple[Source, Window]
"""What is copied."""

SPARE_BYTES = 256 << 20
"""left free for the tables and for what else runs on the GPU"""


class ResidentSources:
    """Copies of parts of a pool's tensors, and of ranks, on one device.

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
        return sum(_padded(part.numel()) * part.element_size() for part in self._missing(items).values())

    def free_bytes(self) -> float:
        """Room for more copies. On the CPU, where the interpreter's tests are small, everything is free."""
        allowed = self._most_bytes - sum(copy.nbytes for copy in self._copies.values())
        if self._device.type != "cuda":
            return allowed
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return min(allowed, float(torch.cuda.mem_get_info(self._device)[0] + unused - SPARE_BYTES))

    def hold(self, items: Iterable[Item]) -> bool:
        """Copies what is not there yet; False where memory that looked free was not (in pieces, or taken meanwhile)."""
        for place, part in self._missing(items).items():
            try:
                copy = torch.zeros(_padded(part.numel()), dtype=part.dtype, device=self._device)
            except torch.OutOfMemoryError:
                return False
            copy[: part.numel()].view(part.shape).copy_(part)
            self._copies[place] = copy
        return True

    def drop(self) -> None:
        """Frees all copies; their memory goes back to the GPU, for whoever else has use for it."""
        self._copies.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def tensor(self, source: Source, window: Window) -> torch.Tensor:
        """The copy of what is held: flat, with zeros behind its last element; ranks as int16 with their bits."""
        return self._copies[_place(self._on_cpu(source), window)]

    def _missing(self, items: Iterable[Item]) -> dict[Place, torch.Tensor]:
        """What is not copied yet, on the CPU: (stretches, elements of a stretch) each."""
        found: dict[Place, torch.Tensor] = {}
        for source, window in items:
            tensor = self._on_cpu(source)
            place = _place(tensor, window)
            if place not in self._copies:
                flat = tensor.reshape(-1)[window.start :]
                found[place] = flat.as_strided((window.n_stretches, window.length), (window.pitch, 1))
        return found

    def _on_cpu(self, source: Source) -> torch.Tensor:
        if isinstance(source, np.ndarray):
            return torch.from_numpy(source.view(np.int16))
        return self._pool.tensor(*source.key)


def _place(tensor: torch.Tensor, window: Window) -> Place:
    return tensor.data_ptr(), tensor.dtype, window


def _padded(n_elements: int) -> int:
    return max(-(-n_elements // BLOCK), 1) * BLOCK
