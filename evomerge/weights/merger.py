"""`Merger`: computes a plan's tensors from a weight pool, and returns them or stores them in an engine's live parameters.

Arithmetic is in float32 (unless the plan asks for less), rounded once to the plan's dtype. Compiled kernels are used where possible, on the
GPU if the engine's weights are there; everything else uses the methods' plain reference implementations. All give the same values.
Knows nothing of recipes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from evomerge.core import CheckpointError
from evomerge.plan import MergePlan, TensorInput, TensorStep, WeightTarget
from evomerge.weights.fused.batch import Destination, FusedBatch
from evomerge.weights.fused.steps import FusedStep
from evomerge.weights.places import Place, Places
from evomerge.weights.pool import WeightPool
from evomerge.weights.registry import reference
from evomerge.weights.scan import first_bad_element
from evomerge.weights.tensor_group import TensorGroup
from evomerge.weights.triton import triton_batch
from evomerge.weights.warm_memory import WarmMemory
from evomerge.weights.windows import Window, whole

if TYPE_CHECKING:
    from evomerge.weights.triton.batch import TritonBatch

    Batch = FusedBatch | TritonBatch

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class Merger:
    """Merges from one pool, repeatedly unless `once`. Not thread-safe.

    Args:
        pool: the sources; must contain every model that a plan names.
        threads: number of CPU threads; None = as many as torch uses.
        fused: whether to use the compiled kernels.
        device: where the reference implementations run.
        once: for a single merge: thresholds are found one by one instead of with histograms.
        memory: memory for `tensors` that the kernels compute on the CPU; None = torch's.
        gpu_bytes: maximum size of the copies of the sources on each GPU; None = the free memory.

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
        self._fused = fused
        self._batch = FusedBatch(pool, threads, once=once)
        self._on_gpu: dict[torch.device, TritonBatch | None] = {}
        self._places = Places()

    def tensors(self, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
        """Every output tensor in the plan's order, rounded to `plan.dtype` (integer buffers keep their type).

        Raises:
            CheckpointError: a model or tensor is not in the pool, or a result is not finite in `plan.dtype`.
        """
        for step in plan.steps:
            form = self._forms(plan, [step]).get(step.output)
            if form is None:
                yield step.output, self._plain(plan, step)
            else:
                everything = whole(step.n_elements)
                yield step.output, self._merged(plan, step, form, self._batch, everything).view(step.shape)

    def write(self, plan: MergePlan, target: WeightTarget) -> None:
        """Compute every tensor of `target` and store it there; its values are those of `tensors`, whatever the views' dtype.

        If the target has only a part of a tensor, only that part is computed. On a GPU, this first waits for pending work (an engine
        computes in its own stream, and may still be reading), and all writes are complete when it returns.

        Raises:
            RecipeError: the target has a tensor that the plan does not produce, or that has a different shape.
            CheckpointError: a model's files have changed, or as for `tensors`; the target then holds a mixture and must be written again.
        """
        self._pool.check_unchanged()
        places: dict[torch.device, list[Place]] = {}
        for place in self._places.of(plan, target):
            places.setdefault(place.region.view.device, []).append(place)
        wait_for(places)
        try:
            for device, own in places.items():
                self._write(plan, own, device)
        finally:
            wait_for(places)

    def _write(self, plan: MergePlan, places: Sequence[Place], device: torch.device) -> None:
        """Store steps in their places on `device`. One group of them is prepared while others are computed."""
        batch, written = self._batch_on(device), list[Destination]()

        def groups() -> Iterator[list[Destination]]:
            for group in self._groups(plan, places, batch.n_groups):
                destinations = list(self._direct(plan, group, batch))
                written.extend(destinations)
                yield destinations

        try:
            bad = batch.run(groups())
            if bad is not None:
                _refuse(bad.output, plan.dtype)
        except CheckpointError:
            # idle layers of a later stack keep their values, which must be finite: zero times infinity is NaN
            for destination in written:
                destination.memory.zero_()
            raise

    def _groups(self, plan: MergePlan, places: Sequence[Place], count: int) -> Iterator[Sequence[Place]]:
        """All places, in order, in about `count` groups of equal size; in a single group if statistics are missing, which all threads compute."""
        steps = {place.step.output: place.step for place in places}.values()
        if count == 1 or self._batch.is_new(steps, DTYPES[plan.math_dtype]):
            yield places
            return
        done = np.cumsum([place.region.view.numel() for place in places])
        edges = np.searchsorted(done, done[-1] * np.arange(1, count) / count)
        for first, end in pairwise(np.unique([0, *edges.tolist(), len(places)]).tolist()):
            yield places[first:end]

    def _direct(self, plan: MergePlan, group: Sequence[Place], batch: "Batch") -> Iterator[Destination]:
        """Yield the destinations that `batch` can write directly; the rest is computed and stored here."""
        fused = self._forms(plan, list({place.step.output: place.step for place in group}.values()))
        wanted: list[tuple[Place, Window]] = []
        for place in group:
            form = fused.get(place.step.output)
            if form is None:
                place.region.view.copy_(self._plain(plan, place.step)[place.region.index])
            else:
                wanted.append((place, batch.covering(form, place.window or place.entire, place.entire)))
        chosen = (
            batch if batch.ready([(fused[place.step.output], covered) for place, covered in wanted]) else self._batch
        )
        for (step, region, window, entire), covered in wanted:
            form = fused[step.output]
            if chosen is not batch:
                covered = window or entire
            elif chosen is not self._batch and window is not None and window != entire:
                # a GPU has only a part of the tensor, but norms are those of the whole
                fused[step.output] = form = self._batch.measured(step, form)
            if covered != window:  # also if there is no window
                merged = self._merged(plan, step, form, chosen, covered).view(step.shape)
                region.view.copy_(merged[region.index])
            elif chosen is batch and _is_direct(plan, region.view, batch):
                yield Destination(step, form, window, region.view, plan.dtype == "bfloat16")
            else:
                region.view.copy_(self._merged(plan, step, form, chosen, window).view(region.view.shape))

    def _forms(self, plan: MergePlan, steps: list[TensorStep]) -> dict[str, FusedStep]:
        """The fused form of every step that has one, by output."""
        if not self._fused:
            return {}
        forms = self._batch.prepare(steps, plan.seed, DTYPES[plan.math_dtype])
        return {step.output: form for step, form in zip(steps, forms, strict=True) if form is not None}

    def _batch_on(self, device: torch.device) -> "Batch":
        """The batch that computes tensors for memory on `device`."""
        if device not in self._on_gpu:
            self._on_gpu[device] = triton_batch(self._pool, device, self.gpu_bytes)
        return self._on_gpu[device] or self._batch

    def _merged(
        self, plan: MergePlan, step: TensorStep, form: FusedStep, batch: "Batch", window: Window
    ) -> torch.Tensor:
        """A part of one tensor, flat, on the device of `batch`."""
        dtype = DTYPES[plan.dtype]
        # there is no CPU kernel for rounding to float16: torch converts the float32 result
        stored = dtype if dtype in batch.writes else torch.float32
        if self._memory is not None and batch is self._batch:
            merged = self._memory.empty((window.n_elements,), stored)
        else:
            merged = torch.empty(window.n_elements, dtype=stored, device=batch.device)
        bad = batch.run([[Destination(step, form, window, merged, False)]])
        merged = merged.to(dtype)
        if bad is not None or (dtype is torch.float16 and first_bad_element(merged) is not None):
            _refuse(step.output, plan.dtype)
        return merged

    def _plain(self, plan: MergePlan, step: TensorStep) -> torch.Tensor:
        """One tensor on the CPU, computed without kernels."""
        if step.is_copy:
            return self._input(step.inputs[0]).clone()
        merged = self._reference(plan, step).to(DTYPES[plan.dtype])
        if first_bad_element(merged) is not None:
            _refuse(step.output, plan.dtype)
        return merged.cpu()

    def _reference(self, plan: MergePlan, step: TensorStep) -> torch.Tensor:
        """The result of the reference implementation, in the dtype of the arithmetic."""
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
    """Wait until all pending work on those of `devices` that are GPUs is done, in all streams."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _is_direct(plan: MergePlan, view: torch.Tensor, batch: "Batch") -> bool:
    """Whether `batch` can write results, rounded as in the plan, directly into `view`."""
    exact = view.dtype is DTYPES[plan.dtype] or (plan.dtype == "bfloat16" and view.dtype is torch.float32)
    return exact and view.device == batch.device and view.dtype in batch.writes and view.is_contiguous()


def _refuse(name: str, dtype: str) -> NoReturn:
    raise CheckpointError(
        f"merged tensor {name!r} contains values outside the range of {dtype} (or NaN): "
        "the recipe's weights are too large; use smaller ones or another out_dtype"
    )
