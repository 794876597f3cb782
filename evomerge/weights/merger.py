"""`Merger`: computes a plan's tensors from a weight pool and hands them over or stores them in an engine's live parameters.

Arithmetic in float32 (unless the plan asks for less), rounded once to the plan's dtype. Knows nothing of recipes.
"""

from collections.abc import Iterator, Mapping

import torch

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import MergePlan, TensorInput, TensorStep, WeightTarget
from evomerge.plan.planner import COPY
from evomerge.weights.pool import WeightPool
from evomerge.weights.registry import reference
from evomerge.weights.scan import first_bad_element
from evomerge.weights.tensor_group import TensorGroup

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class Merger:
    """Merges from one pool, again and again.

    Args:
        pool: the sources; must hold every model a plan names.
    """

    def __init__(self, pool: WeightPool) -> None:
        self._pool = pool

    def tensors(self, plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
        """Every output tensor in the plan's order, rounded to `plan.dtype` (integer buffers keep their type).

        Raises:
            CheckpointError: the pool lacks a model or tensor, or a result is not finite in `plan.dtype`.
        """
        for step in plan.steps:
            yield step.output, self._merged(plan, step)

    def write(self, plan: MergePlan, target: WeightTarget) -> None:
        """Computes every tensor of `target` and stores it there; its values are those of `tensors`, whatever the views' dtype.

        Raises:
            RecipeError: the target has a tensor that the plan does not make, or of another shape.
            CheckpointError: as `tensors`; the target then holds a mixture and must be written again.
        """
        steps = {step.output: step for step in plan.steps}
        for name in target.names():
            step = steps.get(name)
            if step is None:
                raise RecipeError(f"the engine has a tensor {name!r} that the merge does not make")
            merged = self._merged(plan, step)
            for region in target.regions(name):
                part = merged[region.index]
                if part.shape != region.view.shape:
                    raise RecipeError(
                        f"tensor {name!r}: the merge gives shape {tuple(part.shape)}, the engine has {tuple(region.view.shape)}"
                    )
                region.view.copy_(part)

    def _merged(self, plan: MergePlan, step: TensorStep) -> torch.Tensor:
        if step.method == COPY and not step.parameters:
            return self._input(step.inputs[0]).clone()
        dtype = DTYPES[plan.math_dtype]
        group = TensorGroup(
            step.output,
            [self._input(entry).to(dtype) for entry in step.inputs],
            [entry.parameters for entry in step.inputs],
            None if step.base is None else self._input(step.base).to(dtype),
            step.parameters,
            plan.seed,
        )
        merged = reference(step.method)(group).to(DTYPES[plan.dtype])
        _check_result(merged, step.output, plan.dtype)
        return merged

    def _input(self, entry: TensorInput) -> torch.Tensor:
        return self._pool.tensor(entry.source, entry.tensor)


def _check_result(merged: torch.Tensor, name: str, dtype: str) -> None:
    index = first_bad_element(merged)
    if index is not None:
        raise CheckpointError(
            f"merged tensor {name!r} holds {merged.reshape(-1)[index].item()} at flat index {index}: "
            f"the recipe's values leave the range of {dtype}; use smaller weights or another out_dtype"
        )
