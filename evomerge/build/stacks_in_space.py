"""Finds the point of a space of layer stacks that makes a given recipe. Works on the recipe's plan, so the form of the recipe does not matter."""

import math
from collections import defaultdict
from collections.abc import Mapping

from evomerge.plan import MergePlan, ModelHeader, TensorKey, TensorStep, make_plan
from evomerge.plan.layers import layer_name
from evomerge.recipe import Recipe, StackLayer, StackTemplate

_PRECISION = 1e-9
"""tolerance for equal coefficients, relative to the largest of a sum"""

_SHIFT: TensorKey = ("", "shift")
"""the key of a constant that is added to a sum of tensors"""

_Sum = Mapping[TensorKey, float]
"""a tensor as a linear combination: the nonzero coefficient of each tensor in it"""


def values_of_stack(
    recipe: Recipe, template: StackTemplate, headers: Mapping[str, ModelHeader]
) -> dict[str, float] | None:
    """The parameter values at which `template` makes the same merge; None if none are found."""
    wanted = _sums(make_plan(recipe, headers))
    if wanted is None:
        return None
    found = _layers(wanted, template)
    if found is None:
        return None
    values = template.values_of(*found)
    if values is None:
        return None
    made = _sums(make_plan(template.recipe(values), headers))
    return values if made is not None and _are_close(made, wanted) else None


def _sums(plan: MergePlan) -> dict[str, _Sum] | None:
    """Output -> its linear combination of inputs; None if an output is not one."""
    sums = {step.output: _sum(step) for step in plan.steps}
    known = {output: combination for output, combination in sums.items() if combination is not None}
    return known if len(known) == len(sums) else None


def _sum(step: TensorStep) -> _Sum | None:
    if step.method not in ("passthrough", "linear", "task_arithmetic", "shifted_linear"):
        return None
    name = "scale" if step.method == "passthrough" else "weight"
    total: dict[TensorKey, float] = {}
    for entry in step.inputs:
        total[entry.key] = total.get(entry.key, 0.0) + float(entry.parameters.get(name, 1.0))
    if step.parameters.get("normalize"):
        divisor = sum(total.values())
        if not divisor:
            return None
        total = {key: coefficient / divisor for key, coefficient in total.items()}
    if step.base is not None:
        total = {key: float(step.parameters["lambda"]) * coefficient for key, coefficient in total.items()}
        total[step.base.key] = 1.0 - sum(total.values())
    total[_SHIFT] = float(step.parameters.get("shift", 0.0))
    least = _PRECISION * max(map(abs, total.values()))
    return {key: coefficient for key, coefficient in total.items() if abs(coefficient) > least}


def _layers(sums: Mapping[str, _Sum], template: StackTemplate) -> tuple[list[StackLayer], dict[str, float]] | None:
    """The layers of a stack, and the models' coefficients for tensors outside of layers; None if these are not whole layers."""
    parts: dict[int, dict[str, _Sum]] = defaultdict(dict)
    ends: dict[str, float] = {}
    for output, combination in sums.items():
        name = layer_name(output)
        if name is None:
            ends = {source: coefficient for (source, _), coefficient in combination.items()}
        else:
            parts[name.index][name.rest] = combination
    layers: list[StackLayer] = []
    before = 1.0
    for number in range(len(parts)):
        found = _layer(parts.get(number, {}), template.scaled)
        if found is None:
            return None
        index, weights, product = found
        scale = product / before
        if not 0.0 < scale < math.inf:
            return None
        layers.append(StackLayer(index, tuple(weights.items()), scale))
        before = product
    return layers, ends


def _layer(parts: Mapping[str, _Sum], scaled: tuple[str, ...]) -> tuple[int, dict[str, float], float] | None:
    """For the tensors of one layer: the index of this layer in the models, the models' coefficients, and the product of the scales so far."""
    plain = next((part for rest, part in parts.items() if not any(text in rest for text in scaled)), None)
    divided = next((part for rest, part in parts.items() if any(text in rest for text in scaled)), None)
    if not plain or divided is None:
        return None
    names = {layer_name(tensor) for _, tensor in plain}
    (index, *others) = {None if name is None else name.index for name in names}
    if others or index is None:
        return None
    weights = {source: coefficient for (source, _), coefficient in plain.items()}
    of_divided = {source: coefficient for (source, _), coefficient in divided.items()}
    largest = max(weights, key=lambda source: abs(weights[source]))
    product = weights[largest] / of_divided.get(largest, math.inf)
    return (index, weights, product) if 0.0 < product < math.inf else None


def _are_close(some: Mapping[str, _Sum], others: Mapping[str, _Sum]) -> bool:
    return some.keys() == others.keys() and all(_is_close(some[output], others[output]) for output in some)


def _is_close(one: _Sum, other: _Sum) -> bool:
    slack = _PRECISION * max(map(abs, one.values()), default=0.0)
    return all(abs(one.get(key, 0.0) - other.get(key, 0.0)) <= slack for key in {*one, *other})
