"""Layer stacks as ordinary recipes: the scales of a path are folded into weights, so the result is a plain checkpoint.

In a pre-norm transformer every block normalises its input, so multiplying the hidden state by c > 0 on entering a block changes
nothing inside it. Let s be the product of all scales up to a block. Dividing the block's contribution to the hidden state by s and
leaving out all scales gives the same logits, because the final norm absorbs the last s; only the norms' epsilon differs. The
contribution is written by the block's output projections (`o_proj`, `down_proj`), which a `passthrough` or `linear` merge can
scale, or by the weights of a norm that follows them.

Knows nothing of model files; `evomerge.plan.folding` says which weights these are.
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
        index: index of the layer in the models.
        weights: (model folder, coefficient) terms of the linear combination of that layer; a single model with 1.0 = a plain layer.
        scale: factor > 0 of the hidden state on entering the layer (arXiv 2403.13187).
    """

    index: int
    weights: tuple[tuple[str, float], ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Folding:
    """Where the scales of a stack are folded into an architecture's weights.

    Attributes:
        scaled: filters for the tensors (and biases) that are divided by the scale.
        shifted: whether these tensors represent 1 + w (Gemma's norms).
        silenced: filters for the tensors that make a block add nothing when they are zero.
        ends: filters for the tensors outside the layers.
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

    If every layer belongs to a single model, and embedding and output layer are from the model of the first and last layer, it is a
    `passthrough` with one slice for each run of consecutive layers with the same product of scales. Otherwise it is a `linear` merge
    without normalisation, with one slice per layer, or `shifted_linear` if scaled norms represent 1 + w.

    Args:
        layers: the layers, first to last.
        ends: (model folder, coefficient) of embedding, final norm and output layer.
        folding: where the architecture's scales are folded in.
        out_dtype: type to which the result is rounded.
        name: a label.

    Raises:
        RecipeError: there are no layers, a layer or the ends have no models, or a scale is not positive.
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
    """Whether every tensor comes from a single model, times a factor; in a passthrough, tensors outside the layers come from the first and last layer's model."""
    single = all(len(layer.weights) == 1 and layer.weights[0][1] == 1.0 for layer in layers)
    return single and layers[0].weights == layers[-1].weights == tuple(ends)


def _copies(layers: Sequence[StackLayer], products: Sequence[float], folding: Folding) -> tuple[Slice, ...]:
    """A slice for each run of consecutive layers of one model with the same product of scales."""
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
        # for final norm and output layer, mergekit uses as many sources of the last slice as the first slice has
        listed = [*weights, *outer, *(dict(layers[-1].weights) if index == 0 else ())]
        sources = []
        for model in dict.fromkeys(listed):
            # a model that is listed only for tensors outside the layers may have fewer layers: any layer will do
            first = layer.index if model in weights else 0
            of_ends = outer.get(model, 0.0) if outer else None
            weight = _settings(weights.get(model, 0.0), product, folding, of_ends)
            sources.append(Source(model, (first, first + 1), {"weight": weight}))
        shifts = tuple(Setting(1.0 / product - 1.0, text) for text in folding.scaled) if folding.shifted else ()
        slices.append(Slice(tuple(sources), {"shift": shifts} if shifts and product != 1.0 else {}))
    return tuple(slices)


def _settings(weight: float, product: float, folding: Folding, of_ends: float | None) -> tuple[Setting, ...]:
    """A model's weight in one slice: for tensors outside the layers (None if the slice has none), for scaled tensors, and for the rest."""
    special = [] if of_ends is None or of_ends == weight else [Setting(of_ends, text) for text in folding.ends]
    if product != 1.0:
        special += [Setting(weight / product, text) for text in folding.scaled]
    return (*special, Setting(weight))
