"""Which tensors the coordinates of a template are used for: those that none uses, and the point at which it makes a given merge.

Both are read off plans. Values that tell the coordinates apart show where each is used; where layers interpolate between several, values
that rise evenly with depth show the share of each.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evomerge.build.stacks_in_space import values_of_stack
from evomerge.plan import MergePlan, ModelHeader, make_plan
from evomerge.recipe import SAMPLE_SHARE, MethodsTemplate, Recipe, RecipeTemplate, StackTemplate

_SPREAD = 0.02
"""values that tell coordinates apart are so much of the bounds' width beside the samples of a template, which can be merged"""

_PRECISION = 1e-9
"""to which values are the same, relative to the bounds' width"""


class _Place(NamedTuple):
    """Where a parameter has a value: in an output, for the n-th time that a tensor (source, name) is an input; () = for all inputs."""

    output: str
    tensor: tuple[str, ...]
    occurrence: int
    parameter: str


class _Use(NamedTuple):
    """A place, the coordinates between which layers interpolate there, and each one's share in the value."""

    place: _Place
    gradient: tuple[str, ...]
    shares: tuple[float, ...]


def unused_coordinates(template: RecipeTemplate, headers: Mapping[str, ModelHeader]) -> set[str]:
    """The coordinates whose values no tensor takes, such as those of embeddings in a group of layers in the middle of a model.

    Raises:
        RecipeError, CheckpointError: the models do not fit each other or the method.
    """
    uses = _uses(template, headers)
    used = {name for use in uses for name, share in zip(use.gradient, use.shares, strict=True) if share > 0}
    return {parameter.name for parameter in template.parameters} - used


def values_in_space(
    recipe: Recipe, template: RecipeTemplate | MethodsTemplate | StackTemplate, headers: Mapping[str, ModelHeader]
) -> dict[str, float] | None:
    """The parameter values at which `template` makes the same merge; None where there are none.

    The order of the experts, the seed of random masks and the dtypes do not count.
    """
    if isinstance(template, RecipeTemplate):
        return _values_in(recipe, template, headers)
    if isinstance(template, StackTemplate):
        return values_of_stack(recipe, template, headers)
    for method in template.methods:
        found = _values_in(recipe, method, headers)
        if found is not None:
            return template.point_of(method, found)
    return None


def _values_in(recipe: Recipe, template: RecipeTemplate, headers: Mapping[str, ModelHeader]) -> dict[str, float] | None:
    plan = make_plan(recipe, headers)
    wanted = _values(plan)
    found: dict[tuple[str, ...], list[tuple[tuple[float, ...], float]]] = {}
    for use in _uses(template, headers):
        if use.place not in wanted:
            return None
        found.setdefault(use.gradient, []).append((use.shares, wanted[use.place]))
    solved = {
        name: value
        for gradient, equations in found.items()
        for name, value in zip(gradient, _solution(equations), strict=True)
    }
    values: dict[str, float] = {}
    slack: dict[str, float] = {}
    for item in template.parameters:
        value = solved.get(item.name, math.nan)
        values[item.name] = min(max(value, item.low), item.high)
        slack[_family(item.name)] = _PRECISION * (item.high - item.low)
        if not abs(value - values[item.name]) <= slack[_family(item.name)]:
            return None
    made = make_plan(template.recipe(values), headers)
    same = _makers(made) == _makers(plan) and _are_close(_values(made), wanted, slack)
    return values if same else None


def _uses(template: RecipeTemplate, headers: Mapping[str, ModelHeader]) -> Iterator[_Use]:
    """Where the coordinates are used."""
    bounds = {parameter.name: (parameter.low, parameter.high - parameter.low) for parameter in template.parameters}
    families = {_family(name): extent for name, extent in bounds.items()}
    count = len(template.gradients)
    marks: dict[str, float] = {}
    heights: dict[str, float] = {}
    for number, gradient in enumerate(template.gradients):
        marks |= dict.fromkeys(gradient, (number + 1) / (count + 1))
        heights |= {name: index / max(1, len(gradient) - 1) for index, name in enumerate(gradient)}

    def planned(shares: Mapping[str, float]) -> dict[_Place, float]:
        """The shares that a plan has everywhere, with coordinates of these."""
        at = {name: low + width * (SAMPLE_SHARE + _SPREAD * shares[name]) for name, (low, width) in bounds.items()}
        return {
            place: ((value - families[place.parameter][0]) / families[place.parameter][1] - SAMPLE_SHARE) / _SPREAD
            for place, value in _values(make_plan(template.recipe(at), headers)).items()
            if place.parameter in families
        }

    depths = planned(heights) if any(len(gradient) > 1 for gradient in template.gradients) else {}
    for place, mark in planned(marks).items():
        gradient = template.gradients[round(mark * (count + 1)) - 1]
        at = depths.get(place, 0.0) * (len(gradient) - 1)
        at = round(at) if abs(at - round(at)) < 1e-6 else at
        yield _Use(place, gradient, tuple(max(0.0, 1.0 - abs(at - index)) for index in range(len(gradient))))


def _family(coordinate: str) -> str:
    """The merge parameter that a coordinate is a value of."""
    return coordinate.partition("[")[0]


def _solution(equations: Sequence[tuple[tuple[float, ...], float]]) -> list[float]:
    """The values of a gradient's coordinates that give a merge's values, of several solutions the one nearest to a constant."""
    shares, (first, *others) = zip(*equations, strict=True)
    differences = np.array([0.0, *(value - first for value in others)])
    return [first + float(value) for value in np.linalg.lstsq(np.array(shares), differences, rcond=None)[0]]


def _makers(plan: MergePlan) -> dict[str, tuple[object, ...]]:
    """Output -> what makes it: method, base, inputs."""
    return {
        step.output: (step.method, step.base and step.base.key, *sorted(item.key for item in step.inputs))
        for step in plan.steps
    }


def _values(plan: MergePlan) -> dict[_Place, float]:
    """Every parameter of a plan; switches are 0 or 1."""
    values: dict[_Place, float] = {}
    for step in plan.steps:
        values |= {_Place(step.output, (), 0, name): float(value) for name, value in step.parameters.items()}
        seen: Counter[tuple[str, str]] = Counter()
        for entry in step.inputs:
            number = seen[entry.key]
            seen[entry.key] += 1
            values |= {_Place(step.output, entry.key, number, name): float(v) for name, v in entry.parameters.items()}
    return values


def _are_close(some: Mapping[_Place, float], others: Mapping[_Place, float], slack: Mapping[str, float]) -> bool:
    """Whether all values are the same, those of a parameter within its `slack`."""
    return some.keys() == others.keys() and all(
        abs(value - others[place]) <= slack.get(place.parameter, 0.0) for place, value in some.items()
    )
