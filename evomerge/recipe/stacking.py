"""Layer stacks as ordinary recipes: the scales of a path are folded into weights, so the result is a plain checkpoint.

In a pre-norm transformer every block normalises its input, so multiplying the hidden state by c > 0 on entering a block changes
nothing inside it. Let s be the product of all scales up to a block: dividing what the block adds to the hidden state by s and
leaving all scales out gives the same logits, since the final norm absorbs the last s; only the norms' epsilon differs. What
a block adds comes out of its residual-writing weights (`o_proj`, `down_proj`), which a `passthrough` or `linear` merge can scale by
itself; or, where what it adds is normalised once more, out of that norm's weights.

Knows nothing of model files; `evomerge.plan.folding` says which weights those are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from evomerge.core import RecipeError
from evomerge.recipe.methods import SHIFTED_LINEAR
from evomerge.recipe.parts import Setting, Slice, Source
from evomerge.recipe.recipe import Recipe

ENDS = ("embed_tokens", "lm_head", "model.norm.")
"""filters of the tensors outside the layers: embedding, output layer, final norm"""


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One layer of a stack.

    Attributes:
        index: which layer of the models.
        weights: (model folder, coefficient): its weights are the sum of coefficient times that layer of the model; one model with 1.0 = a plain layer.
        scale: the hidden state is multiplied by it on entering the layer (arXiv 2403.13187), > 0.
    """

    index: int
    weights: tuple[tuple[str, float], ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Folding:
    """Where an architecture takes the scales of a stack.

    Attributes:
        scaled: filters of the tensors (and biases) that are divided by the scale.
        shifted: whether those stand for 1 + w (norms of Gemma).
        silenced: filters of the tensors that make a block add nothing when they are zero.
        ends: filters of the tensors outside the layers.
    """

    scaled: tuple[str, ...]
    silenced: tuple[str, ...]
    shifted: bool = False
    ends: tuple[str, ...] = ENDS


def stack_recipe(
    layers: Sequence[StackLayer],
    *,
    ends: Sequence[tuple[str, float]],
    folding: Folding,
    out_dtype: str | None,
    name: str | None = None,
) -> Recipe:
    """The recipe of a stack.

    Where every layer is one model's own, and embedding and output layer are those of the models of the first and last layer, it is a
    `passthrough` with a slice for each run of layers of equal scale. Everything else is a `linear` merge without normalisation,
    one slice for each layer; `shifted_linear` where scaled norms stand for 1 + w.

    Args:
        layers: the layers, first to last.
        ends: (model folder, coefficient) of embedding, final norm and output layer.
        folding: where the architecture takes the scales.
        out_dtype: what the result is rounded to.
        name: a label.

    Raises:
        RecipeError: no layer, no model, or a scale that is not positive.
    """
    if not layers or not all(layer.weights for layer in layers) or not ends:
        raise RecipeError("a stack needs at least one layer, and models for every layer and for embedding and output")
    for index, layer in enumerate(layers):
        if not layer.scale > 0.0:
            raise RecipeError(f"layer {index} of the stack has scale {layer.scale}; scales must be positive")
    products = list(accumulate((layer.scale for layer in layers), mul))
    if folding.shifted and any(product != 1.0 for product in products):
        method = SHIFTED_LINEAR.name
    else:
        method = "passthrough" if _is_copied(layers, ends) else "linear"
    copied = method == "passthrough"
    return Recipe(
        method,
        _copies(layers, products, folding) if copied else _sums(layers, products, ends, folding),
        parameters={"normalize": (Setting(False),)} if method == "linear" else {},
        out_dtype=out_dtype,
        name=name,
    )


def _is_copied(layers: Sequence[StackLayer], ends: Sequence[tuple[str, float]]) -> bool:
    """Whether every tensor is one model's, times a factor; a passthrough takes those outside the layers from the first and last layer's model."""
    single = all(len(layer.weights) == 1 and layer.weights[0][1] == 1.0 for layer in layers)
    return single and layers[0].weights == layers[-1].weights == tuple(ends)


def _copies(layers: Sequence[StackLayer], products: Sequence[float], folding: Folding) -> tuple[Slice, ...]:
    """A slice for each run of consecutive layers of one model with one product of scales."""
    slices: list[Slice] = []
    first = 0
    for end in range(1, len(layers) + 1):
        if end < len(layers) and _continues(layers[end - 1], layers[end]) and products[end] == products[end - 1]:
            continue
        factor = tuple(Setting(1.0 / products[first], text) for text in folding.scaled)
        source = Source(
            layers[first].weights[0][0],
            (layers[first].index, layers[end - 1].index + 1),
            {"scale": factor} if products[first] != 1.0 else {},
        )
        slices.append(Slice((source,)))
        first = end
    return tuple(slices)


def _continues(before: StackLayer, layer: StackLayer) -> bool:
    return layer.weights == before.weights and layer.index == before.index + 1


def _sums(
    layers: Sequence[StackLayer], products: Sequence[float], ends: Sequence[tuple[str, float]], folding: Folding
) -> tuple[Slice, ...]:
    """A slice for each layer, which is a weighted sum of models."""
    slices = []
    for index, (layer, product) in enumerate(zip(layers, products, strict=True)):
        outer = dict(ends) if index in (0, len(layers) - 1) else {}
        weights = dict(layer.weights)
        # mergekit takes as many sources for final norm and output layer from the last slice as the first slice has
        listed = [*weights, *outer, *(dict(layers[-1].weights) if index == 0 else ())]
        sources = []
        for model in dict.fromkeys(listed):
            # a model that is listed for tensors outside the layers alone may have fewer layers: any of them will do
            first = layer.index if model in weights else 0
            of_ends = outer.get(model, 0.0) if outer else None
            weight = _settings(weights.get(model, 0.0), product, folding, of_ends)
            sources.append(Source(model, (first, first + 1), {"weight": weight}))
        shifts = tuple(Setting(1.0 / product - 1.0, text) for text in folding.scaled) if folding.shifted else ()
        slices.append(Slice(tuple(sources), {"shift": shifts} if shifts and product != 1.0 else {}))
    return tuple(slices)


def _settings(weight: float, product: float, folding: Folding, of_ends: float | None) -> tuple[Setting, ...]:
    """A model's weight in one slice: of tensors outside the layers (None where the slice makes none), of those that take the scale, of the rest."""
    special = [] if of_ends is None or of_ends == weight else [Setting(of_ends, text) for text in folding.ends]
    if product != 1.0:
        special += [Setting(weight / product, text) for text in folding.scaled]
    return (*special, Setting(weight))
