"""Sources and ranks in GPU memory: the part of each tensor that is merged there, flat, padded with zeros to whole blocks, copied once and kept."""

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
"""Address and dtype of a CPU tensor, and the window of it; models that differ by adapters share unchanged tensors."""

Source = TensorInput | NDArray[np.uint16]
"""A tensor of the pool, or ranks, which must live as long as the pool."""

Item = tuple[Source, Window]
"""A source and the window of it that is copied."""

NO_KIND = -1
"""the kind of ranks, which are not merged"""


class Copy(NamedTuple):
    """A copy on the GPU: flat, with zeros after its last element; ranks are stored as int16 with the same bits. Kernels read it by address and kind."""

    tensor: torch.Tensor
    address: int
    kind: int


class Held(NamedTuple):
    """The copies on the GPU that a form reads.

    Attributes:
        base: of the base; None if there is none.
        inputs: of the tensor of each input.
        ranks: of the ranks of each input; None if it has none.
        kinds: kinds of all inputs, as in `kernels.merge_chunks`.
    """

    base: Copy | None
    inputs: tuple[Copy, ...]
    ranks: tuple[Copy | None, ...]
    kinds: int


_MOST_REMEMBERED = 1 << 17
"""maximum number of cached forms; more than models have tensors, but stacks keep combining different layers"""

SPARE_BYTES = 256 << 20
"""memory left free for the tables and for anything else that runs on the GPU"""


class ResidentSources:
    """Copies of parts of a pool's tensors, and of ranks, on one device.

    Args:
        pool: the sources, on the CPU.
        device: device of the copies.
        most_bytes: maximum total size of the copies; None = the free memory.
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
        """Memory available for more copies. On the CPU, where only small interpreter tests run, memory is not limited."""
        allowed = self._most_bytes - sum(copy.tensor.nbytes for copy in self._copies.values())
        if self._device.type != "cuda":
            return allowed
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return min(allowed, float(torch.cuda.mem_get_info(self._device)[0] + unused - SPARE_BYTES))

    def hold(self, items: Iterable[Item]) -> bool:
        """Copy missing items; return False if memory that seemed free was not (fragmented, or taken in the meantime)."""
        for place, part in self._missing(items).items():
            try:
                copy = torch.zeros(_padded(part.numel()), dtype=part.dtype, device=self._device)
            except torch.OutOfMemoryError:
                return False
            copy[: part.numel()].view(part.shape).copy_(part)
            self._copies[place] = Copy(copy, copy.data_ptr(), KINDS.get(copy.dtype, NO_KIND))
        return True

    def drop(self) -> None:
        """Free all copies and return their memory to the GPU for other uses."""
        self._copies.clear()
        self._found.clear()
        self._held.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def knows(self, form: FusedStep, window: Window) -> bool:
        """Whether the result of `read` is cached, as for most of a search's candidates; if not, the copies may still exist."""
        return _key_of(form, window) in self._held

    def read(self, form: FusedStep, window: Window) -> Held:
        """The copies that `form` reads; its tensors and ranks must have been copied."""
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
        """The copy of a source, which must exist."""
        key = _key(source), window
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._copies[_place(self._on_cpu(source), window)]
        return found

    def _missing(self, items: Iterable[Item]) -> dict[Place, torch.Tensor]:
        """The parts of CPU tensors that are not copied yet, each as (stretches, elements of a stretch)."""
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
    """Identify what a form reads."""
    base = None if form.base is None else form.base.key
    return (window, base, *[(entry.key, id(prune.ranks)) for entry, _, prune in form.inputs])


def _key(source: Source) -> TensorKey | int:
    """Identify a source; ranks are identified by their array, which is kept alive."""
    return id(source) if isinstance(source, np.ndarray) else source.key


def _place(tensor: torch.Tensor, window: Window) -> Place:
    return tensor.data_ptr(), tensor.dtype, window


def _padded(n_elements: int) -> int:
    return max(-(-n_elements // BLOCK), 1) * BLOCK
