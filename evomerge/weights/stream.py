"""Merging straight from files: each tensor is read when its turn comes and forgotten afterwards, so memory does not grow with the models.

Two tensors are worked on at a time, so reading, computing and the caller's writing overlap. Knows nothing of recipes or of
where results go.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import MergePlan, ModelHeader, TensorHeader, TensorStep, check_unchanged
from evomerge.plan.planner import is_copy
from evomerge.weights.fused.steps import fused_methods
from evomerge.weights.mapping import TORCH_DTYPES, read_tensor
from evomerge.weights.merger import Merger
from evomerge.weights.pool import WeightPool, check_finite
from evomerge.weights.vocabulary import Alignment

Tensors = Mapping[tuple[str, str], torch.Tensor]
"""(model, tensor name) -> tensor"""

_AT_ONCE = 2
"""tensors worked on while one is written; more would need more memory, and threads within a tensor use further cores"""

_OUTPUT_BYTES = 4
"""of an element of a result, before it is rounded"""


class StreamedMerge:
    """One merge that reads its sources as it goes.

    Args:
        headers: key of every model of the plans -> its header, as the files have it.
        alignment: rearranges the rows of embeddings; None = they are merged as they are.
        device: where arithmetic without compiled kernels runs.
        max_bytes: largest sum of all tensors held at a time; None = those of two steps and a result.

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

    def tensors(self, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
        """Every output tensor in the plan's order, as `Merger.tensors` makes them.

        Raises:
            RecipeError: a tensor needs more than `max_bytes`.
            CheckpointError: a source holds NaN or an infinity, its files change meanwhile, or as `Merger.tensors`.
        """
        needed = [self._working_bytes(step) for step in plan.steps]
        self._check_memory(plan, needed)
        try:
            with ThreadPoolExecutor(_AT_ONCE, "evomerge-stream") as workers:
                running: deque[Future[torch.Tensor]] = deque()
                handed = 0
                for index, step in enumerate(plan.steps):
                    merged = running.popleft().result() if running else self._merged(plan, step)
                    handed = max(handed, index + 1)
                    # a result counts like its step until the caller has written it
                    while handed < len(needed) and len(running) < _AT_ONCE and self._fit(needed[index : handed + 1]):
                        running.append(workers.submit(self._merged, plan, plan.steps[handed]))
                        handed += 1
                    yield step.output, merged
                    del merged
            for header in self._headers.values():
                check_unchanged(header)
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _merged(self, plan: MergePlan, step: TensorStep) -> torch.Tensor:
        # a pool and a merger of one step, so that nothing they remember outlives it
        pool = WeightPool.holding(self._read(step))
        fused = self._device == "cpu"
        merger = Merger(pool, threads=self._threads, fused=fused, device=self._device, once=True)
        (_, merged), *_ = merger.tensors(replace(plan, steps=(step,)))
        return merged

    def _read(self, step: TensorStep) -> Tensors:
        entries = step.inputs if step.base is None else (*step.inputs, step.base)
        keys = dict.fromkeys((entry.source, entry.tensor) for entry in entries)
        if self._alignment is not None and any(self._alignment.concerns(name) for _, name in keys):
            return self._alignment.aligned(tuple(keys), self._one)
        return {key: self._one(*key) for key in keys}

    def _one(self, source: str, name: str) -> torch.Tensor:
        tensor = read_tensor(self._headers[source], name, self._stored)
        check_finite(tensor, source, name)
        return tensor

    def _stored(self, folder: Path, header: TensorHeader) -> torch.Tensor:
        path = folder / header.file
        dtype = TORCH_DTYPES[header.dtype]
        tensor = torch.empty(header.shape, dtype=dtype)
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self._opening:
                if path not in self._files:
                    self._files[path] = os.open(path, os.O_RDONLY)
            done = 0
            while done < len(memory):
                count = os.preadv(self._files[path], [memory[done:]], header.start + done)
                if count == 0:
                    raise CheckpointError(f"{path}: ended while it was read; models must not change during a merge")
                done += count
        except OSError as problem:
            raise CheckpointError(f"{path}: cannot be read: {problem.strerror}") from None
        return tensor

    def _fit(self, needed: list[int]) -> bool:
        return self._max_bytes is None or sum(needed) <= self._max_bytes

    def _check_memory(self, plan: MergePlan, needed: list[int]) -> None:
        if self._max_bytes is None:
            return
        for step, n_bytes in zip(plan.steps, needed, strict=True):
            if n_bytes > self._max_bytes:
                raise RecipeError(
                    f"max-memory is {self._max_bytes} bytes; merging {step.output!r} with {step.method} needs about {n_bytes}: "
                    "raise it (tensors are merged whole)"
                )

    def _working_bytes(self, step: TensorStep) -> int:
        """Everything that exists while the step is computed."""
        entries = step.inputs if step.base is None else (*step.inputs, step.base)
        stored = 0
        for source, name in dict.fromkeys((entry.source, entry.tensor) for entry in entries):
            header = self._headers[source]
            n_bytes = header.tensors[name].end - header.tensors[name].start
            adapted = header.adapter is not None and name in header.adapter.updates
            aligned = self._alignment is not None and self._alignment.concerns(name)
            n_elements = max(math.prod(step.shape), math.prod(header.tensors[name].shape))
            stored += n_bytes + 4 * n_elements * (2 * adapted + aligned)
        n_elements = math.prod(step.shape)
        if is_copy(step):
            return 2 * stored
        working = _OUTPUT_BYTES * n_elements
        if step.method not in fused_methods() or self._device != "cpu":
            # the references hold float32 copies of the inputs, their deltas, and a few results between
            working += 4 * n_elements * (3 * len(entries) + 3)
        return stored + working
