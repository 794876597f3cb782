"""Plans of stacks for an engine with more layers than the stack: the unused layers pass the hidden state through unchanged."""

from collections.abc import Sequence
from dataclasses import replace

from evomerge.core import RecipeError
from evomerge.plan.layers import layer_name
from evomerge.plan.merge_plan import MergePlan, TensorInput, TensorStep


def padded(plan: MergePlan, n_slots: int, silenced: Sequence[str]) -> MergePlan:
    """`plan` for an engine of `n_slots` layers.

    A block adds nothing to the hidden state if its output projections are zero. Those of every idle layer are therefore written as
    zero times the first layer's; the rest of an idle layer may keep any finite values (`MergePlan.idle`).

    Args:
        plan: of the stack.
        n_slots: number of layers of the engine, at least that of the plan.
        silenced: filters for the tensors that silence a block when they are zero (`Folding.silenced`).

    Raises:
        RecipeError: the stack is deeper than the engine.
    """
    if plan.n_layers > n_slots:
        raise RecipeError(f"a stack of {plan.n_layers} layers does not fit into an engine of {n_slots}")
    zeros: list[TensorStep] = []
    idle: set[str] = set()
    for step in plan.steps:
        layer = layer_name(step.output)
        if layer is None or layer.index != 0:
            continue
        for index in range(plan.n_layers, n_slots):
            name = layer.renumbered(index)
            if any(text in name for text in silenced):
                first = step.inputs[0]
                nothing = TensorInput(first.source, first.tensor, {"scale": 0.0})
                zeros.append(TensorStep(name, step.shape, "passthrough", (nothing,), None, {}))
            else:
                idle.add(name)
    return replace(plan, steps=(*plan.steps, *zeros), idle=frozenset(idle))
