"""`RecipeTemplate`: a merge with open parameters, their search space, and the recipe for a point of the space.

Also the baselines of every search: each source alone, the uniform average, task arithmetic.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import cast

from evomerge.core import UNIFORM, RecipeError, SpaceError, source_baseline, weighted_baseline
from evomerge.recipe.coordinates import AXES, Coordinates, SearchedParameter
from evomerge.recipe.methods import BaseRole, MethodSpec, ParameterSpec, Scope, method_spec
from evomerge.recipe.parts import Parameters, ParameterValue, Setting, Slice, Source
from evomerge.recipe.recipe import Recipe
from evomerge.space import SearchSpace

SAMPLE_SHARE = 0.5318309886
"""relative position of a sample between the bounds: near the middle, but not at 0 for bounds -1 and 1, where normalised weights are undefined"""

_LEAST_WIDTH = 1e-9
"""minimum width of bounds, relative to their magnitude; in narrower ones values differ only in their last digits, if at all"""

_NORMALISING = ("normalize", "normalize_weights")
"""names of the normalisation switch; methods without one (nuslerp) always normalise"""

_FELT = ("density", "lambda")
"""parameters that change every result with nonzero weights unless they are 1; the other parameters that can be fixed leave a complete task vector unchanged"""


class RecipeTemplate:
    """A merge with open parameters.

    Args:
        method: merge method.
        base: base model folder; None if there is none.
        experts: name -> folder of the models to be merged.
        searched: the open parameters.
        fixed: parameters with one value for the whole search.
        n_layers: number of transformer layers of every model.
        layer_groups: consecutive [first, last) ranges that cover [0, n_layers); one group (the default) = a whole-model recipe.
        smooth: layers interpolate between the values of at least two layer groups (`Coordinates`).
        module_groups: group -> filters, as from `module_filters`; None = no groups.
        out_dtype: type to which merged weights are rounded.
        seed: of the random masks; one seed for the whole search (common random numbers).
        unused: names of coordinates that are left out because no tensor would use their values.

    Attributes:
        parameters: of the space; may be empty if this is one of several methods.
        gradients: names of coordinates; those between which layers interpolate are grouped together in order of depth.

    Raises:
        RecipeError: the method does not take these models or parameters.
        SpaceError: the groups or bounds are invalid.
    """

    def __init__(
        self,
        *,
        method: str,
        base: str | None,
        experts: Mapping[str, str],
        searched: Sequence[SearchedParameter],
        n_layers: int,
        out_dtype: str | None,
        seed: int,
        fixed: Mapping[str, ParameterValue] | None = None,
        layer_groups: Sequence[tuple[int, int]] | None = None,
        smooth: bool = False,
        module_groups: Mapping[str, Sequence[str]] | None = None,
        unused: Collection[str] = (),
    ) -> None:
        self._spec = method_spec(method)
        self._base, self._experts = base, dict(experts)
        self._searched, self._fixed = tuple(searched), dict(fixed or {})
        self._open = {parameter.name for parameter in searched}
        self._coordinates = Coordinates(
            self._searched,
            tuple(self._experts),
            n_layers,
            tuple(layer_groups or [(0, n_layers)]),
            dict(module_groups or {}),
            smooth,
            frozenset(unused),
        )
        self._out_dtype, self._seed = out_dtype, seed
        _check_models(self._spec, base, self._experts)
        for searched_parameter in self._searched:
            _check_searched(self._spec, searched_parameter)
        for name in self._fixed:
            self._spec.parameter(name)
        self._check_complete()
        self.parameters, self.gradients = self._coordinates.parameters, self._coordinates.gradients
        self._space = SearchSpace(self.parameters) if self.parameters else None

    @property
    def space(self) -> SearchSpace:
        """The space of its parameters.

        Raises:
            SpaceError: there are no parameters.
        """
        return self._space or SearchSpace(())

    @property
    def method(self) -> str:
        """The merge method."""
        return self._spec.name

    @property
    def normalised(self) -> bool:
        """Whether weights are normalised, so that only their ratios matter."""
        switches = [parameter for parameter in self._spec.parameters if parameter.name in _NORMALISING]
        return all(bool(self._fixed.get(switch.name, switch.default)) for switch in switches)

    def weights(self, values: Mapping[str, float], layer: int) -> dict[str, float]:
        """Expert -> its weight in layer `layer`, times lambda if there is one.

        Only for spaces whose parameters do not vary over module groups.
        """
        part = next(part for part in self._coordinates.slices if part[0] <= layer < part[1])
        depth = self._coordinates.depth(layer)
        scale = self._settings(values, Scope.GLOBAL, part, None).get("lambda", (Setting(1.0),))[0].number(depth)
        return {
            expert: scale * self._settings(values, Scope.MODEL, part, expert)["weight"][0].number(depth)
            for expert in self._experts
        }

    def recipe(self, values: Mapping[str, float], name: str | None = None) -> Recipe:
        """The recipe of decoded parameter values (`space.decode`)."""
        whole_model = len(self._coordinates.slices) == 1
        slices = []
        for part in self._coordinates.slices:
            layer_range = None if whole_model else part
            sources = tuple(
                Source(path, layer_range, self._settings(values, Scope.MODEL, part, expert))
                for expert, path in self._experts.items()
            )
            if self._spec.base is BaseRole.ENDPOINT and self._base is not None:
                sources = (Source(self._base, layer_range), *sources)
            elif self._spec.base is not BaseRole.SOURCE and self._base is not None and not whole_model:
                # mergekit requires the base in every slice, with the layers to use
                sources = (*sources, Source(self._base, layer_range))
            slices.append(Slice(sources, self._settings(values, Scope.GLOBAL, part, None)))
        return Recipe(
            method=self._spec.name,
            slices=tuple(slices),
            base=self._base if self._spec.base is not BaseRole.SOURCE else None,
            out_dtype=self._out_dtype,
            seed=0 if self._spec.deterministic else self._seed,
            name=name,
        )

    def samples(self) -> Iterator[Recipe]:
        """Recipes to check beforehand whether the models can be merged."""
        yield self.recipe({item.name: item.low + SAMPLE_SHARE * (item.high - item.low) for item in self.parameters})

    def baselines(self, task_arithmetic_weights: Sequence[float]) -> dict[str, Recipe]:
        """name -> recipe: `source:<name>` for base and experts, `uniform`, and `task_arithmetic:<weight>` if there is a base.

        For methods that make task vectors sparse also `<method>:0.5`, with weight and density one half (the starting point of
        arXiv 2403.13187, there for DARE-TIES).
        """
        sources = dict(self._experts) if self._base is None else {"base": self._base, **self._experts}
        recipes = {source_baseline(name): self._plain("linear", {path: 1.0}) for name, path in sources.items()}
        recipes[UNIFORM] = self._plain("linear", dict.fromkeys(self._experts.values(), 1.0))
        if self._base is not None:
            for weight in task_arithmetic_weights:
                weights = dict.fromkeys(self._experts.values(), weight)
                recipes[weighted_baseline("task_arithmetic", weight)] = self._plain("task_arithmetic", weights)
        halves = self._halves()
        if halves is not None:
            recipes[weighted_baseline(self._spec.name, 0.5)] = self.recipe(halves)
        return recipes

    def baseline_values(self, task_arithmetic_weights: Sequence[float]) -> dict[str, dict[str, float]]:
        """For each baseline that is a point of this space, its parameter values."""
        if "weight" not in self._open:
            return {}
        normalised = self.normalised
        wanted = {
            source_baseline(name): {other: float(other == name) for other in self._experts} for name in self._experts
        }
        if self._spec.base is BaseRole.REQUIRED and not normalised:
            wanted[source_baseline("base")] = dict.fromkeys(self._experts, 0.0)
        if self._spec.name in ("linear", "task_arithmetic"):
            # methods that elect signs cannot reproduce these two at any point of their space
            share = 1.0 if normalised else 1.0 / len(self._experts)
            wanted[UNIFORM] = dict.fromkeys(self._experts, share)
            if self._spec.name == "task_arithmetic" and not normalised:
                wanted |= {
                    weighted_baseline("task_arithmetic", w): dict.fromkeys(self._experts, w)
                    for w in task_arithmetic_weights
                }
        points = {name: self._point(weights) for name, weights in wanted.items()}
        halves = self._halves()
        if halves is not None:
            points[weighted_baseline(self._spec.name, 0.5)] = halves
        return {name: values for name, values in points.items() if values is not None}

    def _halves(self) -> dict[str, float] | None:
        """Values with weight and density one half; None if they are not in the space."""
        if "weight" in self._open and ("density" in self._open or self._fixed.get("density") == 0.5):
            return self._point(dict.fromkeys(self._experts, 0.5), density=0.5)
        return None

    def _point(self, weights: Mapping[str, float], density: float | None = None) -> dict[str, float] | None:
        """Values with these weights everywhere, this density, and every other parameter at its neutral value.

        None if the bounds or the fixed parameters exclude this point.
        """
        if density is None and any(weights.values()) and any(self._fixed.get(name, 1.0) != 1.0 for name in _FELT):
            return None
        values: dict[str, float] = {}
        for parameter in self._searched:
            for key, expert in self._coordinates.of(parameter).items():
                if parameter.name == "weight" and expert is None:
                    return None
                neutral = self._spec.parameter(parameter.name).default
                if parameter.name == "weight" and expert is not None:
                    neutral = weights[expert]
                elif parameter.name == "density" and density is not None:
                    neutral = density
                if not isinstance(neutral, float) or not parameter.low <= neutral <= parameter.high:
                    return None
                values[key] = neutral
        return values

    def _settings(
        self, values: Mapping[str, float], scope: Scope, part: tuple[int, int], expert: str | None
    ) -> Parameters:
        """All parameters of one scope for one slice (and expert), as filtered settings."""
        settings: dict[str, tuple[Setting, ...]] = {
            name: (Setting(value),) for name, value in self._fixed.items() if self._spec.parameter(name).scope is scope
        }
        for searched in self._searched:
            if self._spec.parameter(searched.name).scope is scope:
                settings[searched.name] = self._coordinates.settings(searched, values, part, expert)
        return {name: found for name, found in settings.items() if found}

    def _plain(self, method: str, weights: Mapping[str, float]) -> Recipe:
        sources = tuple(Source(path, None, {"weight": (Setting(weight),)}) for path, weight in weights.items())
        base = self._base if method == "task_arithmetic" else None
        return Recipe(method=method, slices=(Slice(sources),), base=base, out_dtype=self._out_dtype)

    def _check_complete(self) -> None:
        for spec in self._spec.parameters:
            if spec.default is None and spec.name not in self._open | self._fixed.keys():
                raise RecipeError(
                    f"merge method {self._spec.name!r} needs {spec.name!r}: search it or fix it (space.fixed.{spec.name})"
                )
        if twice := self._open & self._fixed.keys():
            raise RecipeError(f"{', '.join(sorted(twice))}: both searched and fixed; remove one")

    def check_bounds(self) -> None:
        """Refuse bounds that include recipes which cannot be merged.

        Raises:
            SpaceError: the method keeps entries of a row with probabilities from density - epsilon to density + epsilon, and with
                these bounds some of them would not be valid probabilities.
        """
        wanted = {"density", "epsilon"}
        if not self._open & wanted or not wanted <= {spec.name for spec in self._spec.parameters}:
            return
        (low, high), (_, epsilon) = self._range("density"), self._range("epsilon")
        if "density" not in self._open and (
            low <= 0 or high >= 1
        ):  # such densities keep nothing or everything, whatever epsilon is
            return
        if not (low - epsilon > 0 and high + epsilon < 1):
            raise SpaceError(
                f"merge method {self._spec.name!r}: density - epsilon and density + epsilon must be between 0 and 1, but density "
                f"is in [{low:g}, {high:g}] with epsilon up to {epsilon:g}; narrow the bounds of density, or lower epsilon"
            )

    def _range(self, name: str) -> tuple[float, float]:
        """The smallest and largest value that a per-source parameter can have."""
        searched = next((parameter for parameter in self._searched if parameter.name == name), None)
        if searched is not None:
            return searched.low, searched.high
        value = cast(float | tuple[float, ...], self._fixed.get(name, self._spec.parameter(name).default))
        values = value if isinstance(value, tuple) else (value,)
        return min(values), max(values)


def default_searched(spec: MethodSpec, axes: Sequence[str]) -> list[SearchedParameter]:
    """The parameters that a search over `spec` varies by default: those with `search_default`, over all of `axes` that they allow."""
    return [
        SearchedParameter(parameter.name, parameter.search_low, parameter.search_high, allowed_axes(parameter, axes))
        for parameter in spec.parameters
        if parameter.search_default and parameter.search_low is not None and parameter.search_high is not None
    ]


def default_switches(spec: MethodSpec) -> dict[str, bool]:
    """Values of switches in a search over weights that differ from the method's defaults, unless they are set explicitly."""
    values = {parameter.name: parameter.search_value for parameter in spec.parameters}
    return {name: value for name, value in values.items() if value not in (None, spec.parameter(name).default)}


def allowed_axes(spec: ParameterSpec, axes: Sequence[str]) -> tuple[str, ...]:
    """`axes`, without "expert" for parameters of the whole merge."""
    return tuple(axis for axis in axes if axis != "expert" or spec.scope is Scope.MODEL)


def even_layer_groups(n_layers: int, n_groups: int) -> list[tuple[int, int]]:
    """`n_groups` consecutive ranges of nearly equal size over `n_layers`.

    Raises:
        SpaceError: not between 1 and `n_layers` groups.
    """
    if not 1 <= n_groups <= n_layers:
        raise SpaceError(f"layer_groups: {n_layers} layers cannot be divided into {n_groups} groups")
    edges = [round(index * n_layers / n_groups) for index in range(n_groups + 1)]
    return list(pairwise(edges))


def _check_models(spec: MethodSpec, base: str | None, experts: Mapping[str, str]) -> None:
    if spec.needs_base and base is None:
        raise RecipeError(f"merge method {spec.name!r} needs a base model: set models.base")
    if not spec.takes(len(experts)):
        raise RecipeError(
            f"merge method {spec.name!r} takes {spec.source_range} expert(s), got {len(experts)}: {', '.join(experts) or 'none'}"
        )


def _check_searched(spec: MethodSpec, searched: SearchedParameter) -> None:
    parameter = spec.parameter(searched.name)
    if isinstance(parameter.default, bool):
        raise SpaceError(
            f"parameter {searched.name!r} is a switch and cannot be searched; fix it (space.fixed.{searched.name})"
        )
    if not (parameter.admits(searched.low) and parameter.admits(searched.high)):
        raise SpaceError(
            f"parameter {searched.name!r}: bounds [{searched.low}, {searched.high}] are outside the range of {spec.name}, {parameter.range}"
        )
    if parameter.whole:
        raise SpaceError(
            f"parameter {searched.name!r} is a whole number and cannot be searched; fix it (space.fixed.{searched.name})"
        )
    if 0.0 < searched.high - searched.low < _LEAST_WIDTH * max(abs(searched.low), abs(searched.high)):
        raise SpaceError(
            f"parameter {searched.name!r}: bounds [{searched.low}, {searched.high}] are practically one value; fix it (space.fixed.{searched.name})"
        )
    wrong = [axis for axis in searched.per if axis not in allowed_axes(parameter, AXES)]
    if wrong:
        raise SpaceError(f"parameter {searched.name!r} of {spec.name} cannot vary per {', '.join(wrong)}")
