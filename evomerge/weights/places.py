"""`Places`: where in an engine's parameters each tensor of a plan goes. Knows nothing of merging."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from evomerge.core import RecipeError
from evomerge.plan import MergePlan, Region, TensorStep, WeightTarget, is_embedding, is_head
from evomerge.weights.windows import Window, shape_of, whole, window_of


class Place(NamedTuple):
    """A step, and where a part of its output goes.

    Attributes:
        step: which step.
        region: where to.
        window: the part, None where it is none.
        entire: the whole output.
    """

    step: TensorStep
    region: Region
    window: Window | None
    entire: Window


class _Known(NamedTuple):
    """What was found out about a region of a tensor of this shape."""

    region: Region
    shape: tuple[int, ...]
    window: Window | None
    entire: Window


class Places:
    """Places of one plan after the other. Regions that a target gives again, which all candidates of a search share, are looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}  # by id of the region, which lives as long as what is known of it

    def of(self, plan: MergePlan, target: WeightTarget) -> list[Place]:
        """Where everything goes that the target holds and a plan makes.

        Raises:
            RecipeError: the target has a tensor that the plan does not make, or of another shape.
        """
        steps = {step.output: step for step in plan.steps}
        places: list[Place] = []
        seen: dict[int, _Known] = {}
        for name in target.names():
            if name in plan.idle:
                continue
            step = steps.get(name) or _tied(name, steps)
            if step is None:
                raise RecipeError(f"the engine has a tensor {name!r} that the merge does not make")
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
            f"tensor {name!r}: the merge gives shape {shape}, of which the engine wants {region.index} as {tuple(region.view.shape)}"
        )
    window = window_of(region.index, shape)
    return _Known(region, shape, window, whole(math.prod(shape)))


def _tied(name: str, steps: Mapping[str, TensorStep]) -> TensorStep | None:
    """What makes the output layer `name`, which the target has beside its embedding, of a model that ties it to this; None where there is none."""
    if not is_head(name) or any(map(is_head, steps)):
        return None
    return next((step for output, step in steps.items() if is_embedding(output)), None)
