"""Sources and ranks in the GPU's memory: of each tensor what is merged there, flat, padded with zeros to whole blocks, copied once and kept."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.plan import TensorInput, TensorKey
from evomerge.weights.fused.steps import FusedStep
from evomerge.weights.fused.tables import KINDS
from evomerge.weights.pool import WeightPool
from evomerge.weights.triton.kernels import BLOCK, KIND_BITS
from evomerge.weights.windows import Window

Place = tuple[int, torch.dtype, Window]
"""Address and dtype of a tensor of the CPU, and what of it: models that differ by adapters share what those do not change."""

Source = TensorInput | NDArray[np.uint16]
"""A tensor of the pool, or ranks, which must live as long as the pool."""

Item = tuple[Source, Window]
"""What is copied."""

NO_KIND = -1
"""the kind of ranks, which are no numbers to merge"""


class Copy(NamedTuple):
    """What is on the GPU: flat, with zeros behind its last element; ranks as int16 with their bits. Kernels read it by address and kind."""

    tensor: torch.Tensor
    address: int
    kind: int


class Held(NamedTuple):
    """What a form reads, on the GPU.

    Attributes:
        base: None where there is none.
        inputs: the tensor of each input.
        ranks: those of each input, None where it has none.
        kinds: of all inputs, as `kernels.merge_chunks` takes them.
    """

    base: Copy | None
    inputs: tuple[Copy, ...]
    ranks: tuple[Copy | None, ...]
    kinds: int


_MOST_REMEMBERED = 1 << 17
"""forms; more than models have tensors, but stacks take ever other layers together"""

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
        self._copies: dict[Place, Copy] = {}
        self._found: dict[tuple[TensorKey | int, Window], Copy] = {}
        self._held: dict[tuple[object, ...], Held] = {}

    def missing_bytes(self, items: Iterable[Item]) -> int:
        """Size of the copies that `hold` would make."""
        return sum(_padded(part.numel()) * part.element_size() for part in self._missing(items).values())

    def free_bytes(self) -> float:
        """Room for more copies. On the CPU, where the interpreter's tests are small, everything is free."""
        allowed = self._most_bytes - sum(copy.tensor.nbytes for copy in self._copies.values())
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
            self._copies[place] = Copy(copy, copy.data_ptr(), KINDS.get(copy.dtype, NO_KIND))
        return True

    def drop(self) -> None:
        """Frees all copies; their memory goes back to the GPU, for whoever else has use for it."""
        self._copies.clear()
        self._found.clear()
        self._held.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def knows(self, form: FusedStep, window: Window) -> bool:
        """Whether `read` has told of these before, as of most that candidates of one search read; if not, they may be held all the same."""
        return _key_of(form, window) in self._held

    def read(self, form: FusedStep, window: Window) -> Held:
        """What `form`, whose tensors and ranks are held, reads of them."""
        key = _key_of(form, window)
        found = self._held.get(key)
        if found is None:
            if len(self._held) >= _MOST_REMEMBERED:
                self._held.clear()
            inputs = tuple([self.copy(entry, window) for entry, _, _ in form.inputs])
            found = self._held[key] = Held(
                None if form.base is None else self.copy(form.base, window),
                inputs,
                tuple([None if prune.ranks is None else self.copy(prune.ranks, window) for _, _, prune in form.inputs]),
                sum(copy.kind << (KIND_BITS * position) for position, copy in enumerate(inputs)),
            )
        return found

    def copy(self, source: Source, window: Window) -> Copy:
        """The copy of what is held."""
        key = _key(source), window
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._copies[_place(self._on_cpu(source), window)]
        return found

    def _missing(self, items: Iterable[Item]) -> dict[Place, torch.Tensor]:
        """What is not copied yet, on the CPU: (stretches, elements of a stretch) each."""
        missing: dict[Place, torch.Tensor] = {}
        for source, window in items:
            if (_key(source), window) in self._found:
                continue
            tensor = self._on_cpu(source)
            place = _place(tensor, window)
            if place not in self._copies:
                flat = tensor.reshape(-1)[window.start :]
                missing[place] = flat.as_strided((window.n_stretches, window.length), (window.pitch, 1))
        return missing

    def _on_cpu(self, source: Source) -> torch.Tensor:
        if isinstance(source, np.ndarray):
            return torch.from_numpy(source.view(np.int16))
        return self._pool.tensor(*source.key)


def _key_of(form: FusedStep, window: Window) -> tuple[object, ...]:
    """What tells apart what forms read."""
    base = None if form.base is None else form.base.key
    return (window, base, *[(entry.key, id(prune.ranks)) for entry, _, prune in form.inputs])


def _key(source: Source) -> TensorKey | int:
    """What tells sources apart: ranks by their array, which stays."""
    return id(source) if isinstance(source, np.ndarray) else source.key


def _place(tensor: torch.Tensor, window: Window) -> Place:
    return tensor.data_ptr(), tensor.dtype, window


def _padded(n_elements: int) -> int:
    return max(-(-n_elements // BLOCK), 1) * BLOCK
