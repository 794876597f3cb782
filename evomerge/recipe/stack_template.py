"""`StackTemplate`: a layer stack with open parameters, its search space, and the recipe for a point of the space.

The counterpart of `RecipeTemplate` for the data-flow space; parameter-space coefficients may be searched in the same genome.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.core import SpaceError, model_of_baseline, source_baseline
from evomerge.recipe.recipe import Recipe
from evomerge.recipe.stack_paths import PathEncoding, Step
from evomerge.recipe.stacking import Folding, StackLayer, stack_recipe
from evomerge.recipe.template import RecipeTemplate
from evomerge.space import SearchSpace

MERGED = "merged"
"""name of the parameter-space merge among the stacked models"""

LINEAR_METHODS = ("linear", "task_arithmetic")
"""methods whose merge is a linear combination of the models, so that merged layers can be used in a stack"""


@dataclass(frozen=True)
class StackedModels:
    """The models of a stack: folders of the experts by name, the base if there is one, and `n_layers` of each by name."""

    experts: Mapping[str, str]
    base: str | None
    n_layers: Mapping[str, int]

    @property
    def of_one_depth(self) -> bool:
        """Whether all have the same number of layers, so that they could be merged directly."""
        return len(set(self.n_layers.values())) == 1

    def folder(self, name: str) -> str:
        """The folder of a model by name."""
        return self.base if name == "base" and self.base is not None else self.experts[name]


class StackTemplate:
    """A stack whose path, scales and (with `merge`) merge coefficients are searched.

    Args:
        models: the models.
        encoding: converts values to a path.
        folding: where the architecture's scales are folded in (`evomerge.plan.folding_of`).
        merge: the parameter-space merge called `merged`, with its own parameters; None if no layers are merged. Its method is one
            of `LINEAR_METHODS`.
        plain: template that provides the baselines of the search.
        out_dtype: type to which the result is rounded.

    Raises:
        SpaceError: the models of `merge` differ in depth, its method is not linear, or its weights are normalised.
    """

    def __init__(
        self,
        *,
        models: StackedModels,
        encoding: PathEncoding,
        folding: Folding,
        merge: RecipeTemplate | None,
        plain: RecipeTemplate,
        out_dtype: str | None,
    ) -> None:
        if merge is not None and not models.of_one_depth:
            depths = ", ".join(f"{name} has {count} layers" for name, count in models.n_layers.items())
            raise SpaceError(f"stacking.parameters: only models of the same depth can be merged; {depths}")
        if merge is not None and merge.method not in LINEAR_METHODS:
            raise SpaceError(
                f"stacking.parameters: layers merged by {merge.method!r} cannot be stacked in the same search, only those of "
                f"{' and '.join(LINEAR_METHODS)}. Search the merge first, write it with `evomerge merge`, and add it to models.experts"
            )
        if merge is not None and merge.normalised:
            raise SpaceError(
                "stacking.parameters: normalised weights are undefined where all of them are 0; set space.fixed.normalize: false"
            )
        self._models, self._encoding, self._folding = models, encoding, folding
        self._merge, self._plain, self._out_dtype = merge, plain, out_dtype
        self.space = SearchSpace([*encoding.parameters(), *(merge.space.parameters if merge is not None else ())])

    @property
    def max_slots(self) -> int:
        """Number of layers of the deepest model that is evaluated, including baselines."""
        return max(self._encoding.frame.max_depth, *self._models.n_layers.values())

    @property
    def scaled(self) -> tuple[str, ...]:
        """Filters of the tensors that are divided by the product of the scales."""
        return self._folding.scaled

    def path(self, values: Mapping[str, float]) -> tuple[Step, ...]:
        """The layers of decoded parameter values, in order."""
        return self._encoding.path(values)

    def recipe(self, values: Mapping[str, float], name: str | None = None) -> Recipe:
        """The recipe of decoded parameter values (`space.decode`)."""
        return self._stacked(self.path(values), values, name)

    def _stacked(self, path: Sequence[Step], values: Mapping[str, float], name: str | None) -> Recipe:
        layers = [StackLayer(step.layer, self._weights(values, step.model, step.layer), step.scale) for step in path]
        ends = self._weights(values, self._encoding.frame.ends, 0)
        return stack_recipe(layers, ends=ends, folding=self._folding, out_dtype=self._out_dtype, name=name)

    def samples(self) -> Iterator[Recipe]:
        """Recipes to check beforehand whether the models fit each other: one with every layer that a path may use, and the middle of the space."""
        frame, middle = self._encoding.frame, self.space.decode([0.5] * self.space.dimension)
        steps = [*frame.path([]), *(Step(model, layer) for model, layer in frame.offered())]
        yield self._stacked(steps, middle, None)
        yield self.recipe(middle)

    def baselines(self, task_arithmetic_weights: Sequence[float]) -> dict[str, Recipe]:
        """See `RecipeTemplate.baselines`; none of them is stacked. If the models differ in depth, only the models themselves."""
        recipes = self._plain.baselines(task_arithmetic_weights)
        if self._models.of_one_depth:
            return recipes
        return {name: recipe for name, recipe in recipes.items() if model_of_baseline(name)}

    def baseline_values(self, task_arithmetic_weights: Sequence[float]) -> dict[str, dict[str, float]]:
        """For each baseline that is a point of this space, its parameter values; a strategy can start from these."""
        frame = self._encoding.frame
        own = self._encoding.own_path(frame.ends)
        if own is None:
            return {}
        if self._merge is None:
            return {source_baseline(frame.ends): own}
        merged = self._merge.baseline_values(task_arithmetic_weights)
        return {name: {**own, **values} for name, values in merged.items()} if frame.ends == MERGED else {}

    def values_of(self, layers: Sequence[StackLayer], ends: Mapping[str, float]) -> dict[str, float] | None:
        """Parameter values whose recipe is a stack of these layers.

        Args:
            layers: the layers.
            ends: folder -> coefficient, for embedding, final norm and output layer.

        Returns:
            The values, or None if no path is found. Merged layers may be only approximately equal; the caller must check them.
        """
        path = [Step(self._maker(layers, number), layer.index, layer.scale) for number, layer in enumerate(layers)]
        slots = self._encoding.values_of(path)
        if slots is None:
            return None
        merged: list[tuple[int, Mapping[str, float]]] = [
            (layer.index, dict(layer.weights)) for layer, step in zip(layers, path, strict=True) if step.model == MERGED
        ]
        if self._encoding.frame.ends == MERGED:
            merged.append((0, ends))
        return {**self._merge_values(merged), **slots}

    def _maker(self, layers: Sequence[StackLayer], number: int) -> str:
        """The model that provides layer `number`: one whose own layer it is, else the merge."""
        frame, layer = self._encoding.frame, layers[number]
        if not frame.fixed_first <= number < len(layers) - frame.fixed_last:
            return frame.ends
        folders = {
            self._models.folder(model): model
            for model, index in frame.offered()
            if model != MERGED and index == layer.index
        }
        ((folder, coefficient), *others) = layer.weights
        return folders.get(folder, MERGED) if not others and math.isclose(coefficient, 1.0) else MERGED

    def _merge_values(self, merged: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
        """The merge's values that best reproduce these layers (layer, folder -> coefficient), or the middle of the bounds if any values will do."""
        merge = self._merge
        if merge is None:
            return {}
        values = merge.space.decode([0.5] * merge.space.dimension)
        weights = [item for item in merge.space.parameters if item.name.partition("[")[0] == "weight"]
        if not (merged and weights):
            return values

        def coefficients(values: Mapping[str, float]) -> NDArray[np.float64]:
            return np.array([weight for layer, _ in merged for weight in merge.weights(values, layer).values()])

        wanted = [
            folders.get(self._models.experts[name], 0.0)
            for layer, folders in merged
            for name in merge.weights(values, layer)
        ]
        before = coefficients(values)
        slopes = [coefficients({**values, item.name: values[item.name] + 1.0}) - before for item in weights]
        moves = np.linalg.lstsq(np.array(slopes).T, np.array(wanted) - before, rcond=None)[0].tolist()
        moved = {
            item.name: min(max(values[item.name] + move, item.low), item.high)
            for item, move in zip(weights, moves, strict=True)
        }
        return values | moved

    def _weights(self, values: Mapping[str, float], model: str, layer: int) -> tuple[tuple[str, float], ...]:
        """A layer of a model as a linear combination of model folders."""
        if model != MERGED or self._merge is None:
            return ((self._models.folder(model), 1.0),)
        experts = self._merge.weights(values, layer)
        folders = [(self._models.experts[name], weight) for name, weight in experts.items()]
        if self._merge.method == "linear":
            return tuple(folders)
        rest = 1.0 - sum(experts.values())
        return ((self._models.folder("base"), rest), *folders)
