"""`Places`: where each tensor of a plan is stored in an engine's parameters. Knows nothing of merging."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from evomerge.core import RecipeError
from evomerge.plan import MergePlan, Region, TensorStep, WeightTarget, is_embedding, is_head
from evomerge.weights.windows import Window, shape_of, whole, window_of


class Place(NamedTuple):
    """A step, and the destination of a part of its output.

    Attributes:
        step: the step.
        region: the destination.
        window: the part of the output; None if it is not a `Window`.
        entire: the window of the whole output.
    """

    step: TensorStep
    region: Region
    window: Window | None
    entire: Window


class _Known(NamedTuple):
    """Cached result for a region of a tensor of this shape."""

    region: Region
    shape: tuple[int, ...]
    window: Window | None
    entire: Window


class Places:
    """Finds the places of plans. Results are cached by region, because all candidates of a search share the target's regions."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}  # by id of the region, which each entry keeps alive

    def of(self, plan: MergePlan, target: WeightTarget) -> list[Place]:
        """The places of all tensors of the target, except the plan's idle ones.

        Raises:
            RecipeError: the target has a tensor that the plan does not produce, or that has a different shape.
        """
        steps = {step.output: step for step in plan.steps}
        places: list[Place] = []
        seen: dict[int, _Known] = {}
        for name in target.names():
            if name in plan.idle:
                continue
            step = steps.get(name) or _tied(name, steps)
            if step is None:
                raise RecipeError(f"the engine has a tensor {name!r} that the merge does not produce")
            for region in target.regions(name):
                known = self._known.get(id(region))
                if known is None or known.shape != step.shape:
                    known = _look_at(name, region, step.shape)
                seen[id(region)] = known
                places.append(Place(step, region, known.window, known.entire))
        self._known = seen
        return places


def _look_at(name: str, region: Region, shape: tuple[int, ...]) -> _Known:
    if shape_of(region.index, shape) != tuple(region.view.shape):
        raise RecipeError(
            f"tensor {name!r}: the merge gives shape {shape}, but the engine expects {region.index} of it with shape {tuple(region.view.shape)}"
        )
    window = window_of(region.index, shape)
    return _Known(region, shape, window, whole(math.prod(shape)))


def _tied(name: str, steps: Mapping[str, TensorStep]) -> TensorStep | None:
    """The step of the embedding, for the output layer `name` of a target that stores both although the model ties them; None otherwise."""
    if not is_head(name) or any(map(is_head, steps)):
        return None
    return next((step for output, step in steps.items() if is_embedding(output)), None)
