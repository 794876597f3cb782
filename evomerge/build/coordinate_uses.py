"""Which tensors use which coordinates of a template: finds unused coordinates, and the point at which a template makes a given merge.

Both are read from merge plans. Planning with a distinct value for each gradient shows where it is used; if layers interpolate between several
coordinates, planning with values that rise linearly with depth shows the share of each.
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
"""The distinct values lie within this share of the bounds' width of a template's samples, which are known to be mergeable."""

_PRECISION = 1e-9
"""tolerance for equal values, relative to the bounds' width"""


class _Place(NamedTuple):
    """Where a parameter has a value: in an output, for the n-th occurrence of the input tensor (source, name); () = for all inputs."""

    output: str
    tensor: tuple[str, ...]
    occurrence: int
    parameter: str


class _Use(NamedTuple):
    """A place, the coordinates that layers interpolate between there, and the share of each in the value."""

    place: _Place
    gradient: tuple[str, ...]
    shares: tuple[float, ...]


def unused_coordinates(template: RecipeTemplate, headers: Mapping[str, ModelHeader]) -> set[str]:
    """The coordinates that no tensor uses, such as those for embeddings in a group of layers in the middle of a model.

    Raises:
        RecipeError, CheckpointError: the models are incompatible with each other or with the method.
    """
    uses = _uses(template, headers)
    used = {name for use in uses for name, share in zip(use.gradient, use.shares, strict=True) if share > 0}
    return {parameter.name for parameter in template.parameters} - used


def values_in_space(
    recipe: Recipe, template: RecipeTemplate | MethodsTemplate | StackTemplate, headers: Mapping[str, ModelHeader]
) -> dict[str, float] | None:
    """The parameter values at which `template` makes the same merge; None if there are none.

    Differences in the order of the experts, the seed of random masks and the dtypes are ignored.
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
    for parameter in template.parameters:
        value, family = solved.get(parameter.name, math.nan), _family(parameter.name)
        values[parameter.name] = min(max(value, parameter.low), parameter.high)
        slack[family] = _PRECISION * (parameter.high - parameter.low)
        if not abs(value - values[parameter.name]) <= slack[family]:
            return None
    made = make_plan(template.recipe(values), headers)
    same = _steps(made) == _steps(plan) and _are_close(_values(made), wanted, slack)
    return values if same else None


def _uses(template: RecipeTemplate, headers: Mapping[str, ModelHeader]) -> Iterator[_Use]:
    """Every place where coordinates are used."""
    bounds = {parameter.name: (parameter.low, parameter.high - parameter.low) for parameter in template.parameters}
    families = {_family(name): extent for name, extent in bounds.items()}
    count = len(template.gradients)
    marks: dict[str, float] = {}
    heights: dict[str, float] = {}
    for number, gradient in enumerate(template.gradients):
        marks |= dict.fromkeys(gradient, (number + 1) / (count + 1))
        heights |= {name: index / max(1, len(gradient) - 1) for index, name in enumerate(gradient)}

    def planned(shares: Mapping[str, float]) -> dict[_Place, float]:
        """Plan with the coordinates at these shares of the spread, and return the share found at every place."""
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
    """The name of the merge parameter that a coordinate belongs to."""
    return coordinate.partition("[")[0]


def _solution(equations: Sequence[tuple[tuple[float, ...], float]]) -> list[float]:
    """The values of a gradient's coordinates that give the values in `equations`; of several solutions the one nearest to a constant."""
    shares, (first, *others) = zip(*equations, strict=True)
    differences = np.array([0.0, *(value - first for value in others)])
    return [first + float(value) for value in np.linalg.lstsq(np.array(shares), differences, rcond=None)[0]]


def _steps(plan: MergePlan) -> dict[str, tuple[object, ...]]:
    """Output -> how it is made: method, base and inputs."""
    return {
        step.output: (step.method, step.base and step.base.key, *sorted(entry.key for entry in step.inputs))
        for step in plan.steps
    }


def _values(plan: MergePlan) -> dict[_Place, float]:
    """Every parameter value of a plan; switches are 0 or 1."""
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
    """Whether all values are equal, up to the `slack` of each parameter."""
    return some.keys() == others.keys() and all(
        abs(value - others[place]) <= slack.get(place.parameter, 0.0) for place, value in some.items()
    )
