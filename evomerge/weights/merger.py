"""`Merger`: computes a plan's tensors from a weight pool and hands them over or stores them in an engine's live parameters.

Arithmetic in float32 (unless the plan asks for less), rounded once to the plan's dtype. What the compiled kernels can do
goes through them, on the GPU where the engine's weights are; the rest through the methods' plain references. All give the same values.
Knows nothing of recipes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import MergePlan, Region, TensorInput, TensorStep, WeightTarget
from evomerge.weights.fused.batch import Destination, FusedBatch
from evomerge.weights.fused.steps import FusedStep
from evomerge.weights.pool import WeightPool
from evomerge.weights.registry import reference
from evomerge.weights.scan import first_bad_element
from evomerge.weights.tensor_group import TensorGroup
from evomerge.weights.triton import triton_batch
from evomerge.weights.warm_memory import WarmMemory

if TYPE_CHECKING:
    from evomerge.weights.triton.batch import TritonBatch

    Batch = FusedBatch | TritonBatch

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class Merger:
    """Merges from one pool, again and again unless `once`. Not thread-safe.

    Args:
        pool: the sources; must hold every model a plan names.
        threads: number of CPU threads; None = as many as torch uses.
        fused: whether to use the compiled kernels.
        device: where the references run.
        once: for a single merge: thresholds are looked for one by one instead of in histograms.
        memory: where `tensors` that the kernels compute on the CPU are made; None = torch's.
        gpu_bytes: of each GPU, most that copies of the sources there may take; None = what is free.

    Attributes:
        gpu_bytes: as given.
    """

    def __init__(
        self,
        pool: WeightPool,
        *,
        threads: int | None = None,
        fused: bool = True,
        device: str = "cpu",
        once: bool = False,
        memory: WarmMemory | None = None,
        gpu_bytes: float | None = None,
    ) -> None:
        self.gpu_bytes = gpu_bytes
        self._pool = pool
        self._device = device
        self._memory = memory
        self._batch = FusedBatch(pool, threads, once=once) if fused else None
        self._on_gpu: dict[torch.device, TritonBatch | None] = {}

    def tensors(self, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
        """Every output tensor in the plan's order, rounded to `plan.dtype` (integer buffers keep their type).

        Raises:
            CheckpointError: the pool lacks a model or tensor, or a result is not finite in `plan.dtype`.
        """
        for step in plan.steps:
            form = self._fused(plan, [step]).get(step.output)
            yield step.output, self._merged(plan, step, form, self._batch)

    def write(self, plan: MergePlan, target: WeightTarget) -> None:
        """Computes every tensor of `target` and stores it there; its values are those of `tensors`, whatever the views' dtype.

        On a GPU, what was under way there is waited for first (an engine computes in a stream of its own, and may still
        read), and what is written has arrived when this returns.

        Raises:
            RecipeError: the target has a tensor that the plan does not make, or of another shape.
            CheckpointError: a model's files have changed, or as `tensors`; the target then holds a mixture and must be written again.
        """
        self._pool.check_unchanged()
        steps = {step.output: step for step in plan.steps}
        places: list[tuple[TensorStep, Sequence[Region]]] = []
        for name in target.names():
            if name in plan.idle:
                continue
            if name not in steps:
                raise RecipeError(f"the engine has a tensor {name!r} that the merge does not make")
            places.append((steps[name], target.regions(name)))
        fused = self._fused(plan, [step for step, _ in places])
        devices = {region.view.device for _, regions in places for region in regions}
        wait_for(devices)
        try:
            self._write(plan, places, fused, devices)
        finally:
            wait_for(devices)

    def _write(
        self,
        plan: MergePlan,
        places: Sequence[tuple[TensorStep, Sequence[Region]]],
        fused: Mapping[str, FusedStep],
        devices: Iterable[torch.device],
    ) -> None:
        """Stores every step where it belongs."""
        batches = {device: self._batch_on(device, fused) for device in devices} if fused else {}
        direct: dict[Batch, list[Destination]] = {}
        for step, regions in places:
            form = fused.get(step.output)
            for region in regions:
                batch = batches.get(region.view.device) if form is not None else None
                destination = None if batch is None else _direct(plan, step, region, batch)
                if batch is not None and destination is not None:
                    direct.setdefault(batch, []).append(destination)
                else:
                    _store(self._merged(plan, step, form, batch), step.output, region)
        for batch, destinations in direct.items():
            bad = batch.run(destinations, fused)
            if bad is not None:
                # idle layers of a later stack keep what they hold, which must be finite: zero times infinity is NaN
                for destination in destinations:
                    destination.memory.zero_()
                _refuse(bad.output, plan.dtype)

    def _fused(self, plan: MergePlan, steps: list[TensorStep]) -> dict[str, FusedStep]:
        if self._batch is None:
            return {}
        forms = self._batch.prepare(steps, plan.seed, DTYPES[plan.math_dtype])
        return {step.output: form for step, form in zip(steps, forms, strict=True) if form is not None}

    def _batch_on(self, device: torch.device, forms: Mapping[str, FusedStep]) -> "Batch | None":
        """What computes steps of these forms for memory on `device`."""
        if device not in self._on_gpu:
            self._on_gpu[device] = triton_batch(self._pool, device, self.gpu_bytes)
        on_gpu = self._on_gpu[device]
        return on_gpu if on_gpu is not None and on_gpu.ready(forms.values()) else self._batch

    def _merged(self, plan: MergePlan, step: TensorStep, form: FusedStep | None, batch: "Batch | None") -> torch.Tensor:
        """One tensor, on the device of `batch`."""
        if step.is_copy:
            return self._input(step.inputs[0]).clone()
        dtype = DTYPES[plan.dtype]
        if form is not None and batch is not None:
            # the CPU has no kernel for rounding to float16: torch does that from float32
            stored = dtype if dtype in batch.writes else torch.float32
            if self._memory is not None and batch is self._batch:
                merged = self._memory.empty(step.shape, stored)
            else:
                merged = torch.empty(step.shape, dtype=stored, device=batch.device)
            destination = Destination(step, 0, merged.numel(), merged, False)
            bad = batch.run([destination], {step.output: form})
            merged = merged.to(dtype)
            if bad is not None or (dtype is torch.float16 and first_bad_element(merged) is not None):
                _refuse(step.output, plan.dtype)
            return merged
        merged = self._reference(plan, step).to(dtype)
        if first_bad_element(merged) is not None:
            _refuse(step.output, plan.dtype)
        return merged.cpu()

    def _reference(self, plan: MergePlan, step: TensorStep) -> torch.Tensor:
        """In the dtype of the arithmetic."""
        inputs = [self._input(entry) for entry in step.inputs]
        base = None if step.base is None else self._input(step.base)
        dtype = DTYPES[plan.math_dtype]
        group = TensorGroup(
            step.output,
            [tensor.to(self._device, dtype) for tensor in inputs],
            [entry.parameters for entry in step.inputs],
            None if base is None else base.to(self._device, dtype),
            step.parameters,
            plan.seed,
            step.pieces,
        )
        return reference(step.method)(group)

    def _input(self, entry: TensorInput) -> torch.Tensor:
        return self._pool.tensor(*entry.key)


def wait_for(devices: Iterable[torch.device]) -> None:
    """Returns when nothing is under way on those of `devices` that are GPUs, in whatever stream."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _direct(plan: MergePlan, step: TensorStep, region: Region, batch: "Batch") -> Destination | None:
    """The region as one stretch of flat elements in contiguous memory that `batch` writes; None where it is not that."""
    view = region.view
    exact = view.dtype is DTYPES[plan.dtype] or (plan.dtype == "bfloat16" and view.dtype is torch.float32)
    writable = view.device == batch.device and view.dtype in batch.writes and view.is_contiguous()
    if not writable or not exact or not step.shape:
        return None
    bounds = [index.indices(size) for index, size in zip(region.index, step.shape, strict=False)]
    if len(region.index) > len(step.shape) or any(stride != 1 for _, _, stride in bounds):
        return None
    if any((first, last) != (0, size) for (first, last, _), size in zip(bounds[1:], step.shape[1:], strict=False)):
        return None
    first, last, _ = bounds[0] if bounds else (0, step.shape[0], 1)
    if tuple(view.shape) != (last - first, *step.shape[1:]):
        return None
    row = math.prod(step.shape[1:])
    return Destination(step, first * row, last * row, view, plan.dtype == "bfloat16")


def _store(merged: torch.Tensor, name: str, region: Region) -> None:
    part = merged[region.index]
    if part.shape != region.view.shape:
        raise RecipeError(
            f"tensor {name!r}: the merge gives shape {tuple(part.shape)}, the engine has {tuple(region.view.shape)}"
        )
    region.view.copy_(part)


def _refuse(name: str, dtype: str) -> NoReturn:
    raise CheckpointError(
        f"merged tensor {name!r} holds values outside the range of {dtype} (or NaN): "
        "the recipe's weights are too large; use smaller ones or another out_dtype"
    )
