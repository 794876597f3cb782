"""Merges straight from files: each tensor is read when it is needed and dropped afterwards, so memory does not grow with the models.

Large tensors are split into parts if the method is element-wise. Two parts are processed at a time, so that reading, computing and the
caller's writing overlap. Files are read, not mapped: if a mapped file is truncated in the meantime, the process is killed. Knows nothing of
recipes or of the destination of the results.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Lock

import torch

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import MergePlan, ModelHeader, TensorHeader, TensorInput, TensorKey, TensorStep, check_unchanged
from evomerge.weights.checkpoint.vocabulary import Alignment
from evomerge.weights.fused.steps import may_need_reference, scratch_bytes
from evomerge.weights.fused.tables import KINDS
from evomerge.weights.mapping import TORCH_DTYPES, read_tensor
from evomerge.weights.merger import Merger
from evomerge.weights.pool import WeightPool, check_finite
from evomerge.weights.registry import ELEMENTWISE
from evomerge.weights.warm_memory import WarmMemory

_AT_ONCE = 2
"""number of parts processed at a time; more would need more memory, and threads within a part use further cores"""

_AHEAD = 4
"""number of parts that are being processed or waiting to be written, so that neither side waits for a single slow part of the other"""

_PART_ELEMENTS = 1 << 22
"""maximum number of elements of a part of a larger tensor, such that data is still in the processor's cache when it is merged"""

_OUTPUT_BYTES = 4
"""bytes per element of a result before it is rounded"""


@dataclass(frozen=True, slots=True)
class _Part:
    """A unit of work: a tensor or a part of one.

    Attributes:
        step: the step, with the shape of the part.
        first: flat index in the whole tensor at which the part begins; None if it is the whole tensor.
    """

    step: TensorStep
    first: int | None

    def of(self, header: TensorHeader) -> TensorHeader:
        """The header of this part of a stored tensor."""
        if self.first is None:
            return header
        size = TORCH_DTYPES[header.dtype].itemsize
        (n_elements,) = self.step.shape
        start = header.start + self.first * size
        return replace(header, shape=self.step.shape, start=start, end=start + n_elements * size)


class StreamedMerge:
    """One merge that reads its sources as it goes.

    Args:
        headers: model key -> header as in the files, for every model of the plans.
        alignment: rearranges the rows of embeddings; None = they are merged unchanged.
        device: where to compute; the compiled kernels are used only on "cpu".
        max_bytes: maximum total size of the tensors in memory; None = no limit: two parts being computed and a few results.

    Raises:
        CheckpointError: a file changed since its header was read.
    """

    def __init__(
        self,
        headers: Mapping[str, ModelHeader],
        *,
        alignment: Alignment | None = None,
        device: str = "cpu",
        max_bytes: int | None = None,
    ) -> None:
        for header in headers.values():
            check_unchanged(header)
        self._headers = headers
        self._alignment = alignment
        self._device = device
        self._max_bytes = max_bytes
        self._files: dict[Path, int] = {}
        self._opening = Lock()
        self._threads = max(1, torch.get_num_threads() // _AT_ONCE)
        self._memory = WarmMemory()

    def parts(self, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
        """Every output tensor in the plan's order, like `Merger.tensors`; a large one may come as consecutive flat parts.

        Raises:
            RecipeError: a tensor needs more than `max_bytes`.
            CheckpointError: a source contains NaN or infinities, its files change during the merge, or as for `Merger.tensors`.
        """
        parts = [part for step in plan.steps for part in self._parts_of(step)]
        needed = [self._working_bytes(part) for part in parts]
        self._check_memory(parts, needed)
        try:
            with ThreadPoolExecutor(_AT_ONCE, "evomerge-stream") as workers:
                running: deque[Future[torch.Tensor]] = deque()
                waiting = deque(parts)

                def start(index: int) -> None:
                    """Start parts that fit in memory together with part `index`, which counts until the caller has written it."""
                    while (
                        waiting and len(running) < _AHEAD and self._fit(needed[index : len(needed) - len(waiting) + 1])
                    ):
                        running.append(workers.submit(self._merged, plan, waiting.popleft()))

                for index, part in enumerate(parts):
                    start(index)
                    merged = running.popleft().result()
                    start(index)
                    yield part.step.output, merged
                    del merged
            for header in self._headers.values():
                check_unchanged(header)
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _parts_of(self, step: TensorStep) -> list[_Part]:
        n_elements = step.n_elements
        if (
            step.method not in ELEMENTWISE
            or step.is_copy
            or n_elements <= _PART_ELEMENTS
            or any(self._is_adapted(entry) or self._is_aligned(entry.tensor) for entry in step.sources)
        ):
            return [_Part(step, None)]
        # of nearly equal size, so that the memory of one can be reused for the others
        n_parts = -(-n_elements // _PART_ELEMENTS)
        edges = [n_elements * number // n_parts for number in range(n_parts + 1)]
        return [_Part(step._replace(shape=(last - first,)), first) for first, last in pairwise(edges)]

    def _is_adapted(self, entry: TensorInput) -> bool:
        adapter = self._headers[entry.source].adapter
        return adapter is not None and entry.tensor in adapter.updates

    def _is_aligned(self, name: str) -> bool:
        return self._alignment is not None and self._alignment.concerns(name)

    def _merged(self, plan: MergePlan, part: _Part) -> torch.Tensor:
        # a separate pool and merger for each part, so that nothing they cache outlives it
        pool = WeightPool.holding(self._read(part))
        fused = self._device == "cpu"
        merger = Merger(pool, threads=self._threads, fused=fused, device=self._device, once=True, memory=self._memory)
        (_, merged), *_ = merger.tensors(replace(plan, steps=(part.step,)))
        return merged

    def _read(self, part: _Part) -> Mapping[TensorKey, torch.Tensor]:
        def one(source: str, name: str) -> torch.Tensor:
            tensor = read_tensor(
                self._headers[source], name, lambda folder, stored: self._stored(folder, part.of(stored))
            )
            check_finite(tensor, source, name, part.first or 0)
            return tensor

        keys = dict.fromkeys(entry.key for entry in part.step.sources)
        if self._alignment is not None and any(self._is_aligned(name) for _, name in keys):
            return self._alignment.aligned(tuple(keys), one)
        return {key: one(*key) for key in keys}

    def _stored(self, folder: Path, header: TensorHeader) -> torch.Tensor:
        path = folder / header.file
        dtype = TORCH_DTYPES[header.dtype]
        tensor = self._memory.empty(header.shape, dtype)
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self._opening:
                if path not in self._files:
                    self._files[path] = os.open(path, os.O_RDONLY)
            done = 0
            while done < len(memory):
                count = os.preadv(self._files[path], [memory[done:]], header.start + done)
                if count == 0:
                    raise CheckpointError(
                        f"{path}: was truncated while it was read; models must not change during a merge"
                    )
                done += count
        except OSError as problem:
            raise CheckpointError(f"{path}: cannot be read: {problem.strerror}") from None
        return tensor

    def _fit(self, needed: list[int]) -> bool:
        return self._max_bytes is None or sum(needed) <= self._max_bytes

    def _check_memory(self, parts: list[_Part], needed: list[int]) -> None:
        if self._max_bytes is None:
            return
        for part, n_bytes in zip(parts, needed, strict=True):
            if n_bytes > self._max_bytes:
                raise RecipeError(
                    f"max-memory is {self._max_bytes} bytes, but merging {part.step.output!r} with {part.step.method} needs about "
                    f"{n_bytes}: raise it (tensors are merged whole or in parts of {_PART_ELEMENTS} elements)"
                )

    def _working_bytes(self, part: _Part) -> int:
        """Memory of everything that exists while the part is computed."""
        entries, n_elements = part.step.sources, part.step.n_elements
        stored, by_reference = 0, may_need_reference(part.step) or self._device != "cpu"
        for entry in {entry.key: entry for entry in entries}.values():
            header = part.of(self._headers[entry.source].tensors[entry.tensor])
            by_reference |= TORCH_DTYPES[header.dtype] not in KINDS
            most_elements = max(n_elements, math.prod(header.shape))
            stored += header.end - header.start
            stored += 4 * most_elements * (2 * self._is_adapted(entry) + self._is_aligned(entry.tensor))
        if self._alignment is not None and self._alignment.concerns(entries[0].tensor):
            name, known = entries[0].tensor, {entry.source for entry in entries}
            lenders = [self._headers[model].tensors[name] for model in self._alignment.lenders(name) - known]
            stored += max((tensor.end - tensor.start for tensor in lenders), default=0)
        if part.step.is_copy:
            return 2 * stored
        working = (_OUTPUT_BYTES + scratch_bytes(part.step)) * n_elements
        if by_reference:
            # the reference implementations hold float32 copies of the inputs, their deltas, and a few intermediate results
            working += 4 * n_elements * (3 * len(entries) + 3)
        return stored + working
