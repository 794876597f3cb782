"""`Coordinates`: the numbers that a template leaves open, their names, and the recipe settings they produce."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from evomerge.core import SpaceError
from evomerge.recipe.parts import Setting
from evomerge.space import Parameter

AXES = ("expert", "layer_group", "module_group")
"""axes that a parameter can vary over, in the order in which they appear in a coordinate's name"""


@dataclass(frozen=True, slots=True)
class SearchedParameter:
    """A parameter of the method that the search varies within [low, high], with one value for every combination of the axes in `per`."""

    name: str
    low: float
    high: float
    per: tuple[str, ...]


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of a template.

    Attributes:
        searched: the open parameters.
        experts: names of the models.
        n_layers: number of layers of every model.
        layer_groups: consecutive [first, last) ranges that cover [0, n_layers).
        module_groups: group -> filters; empty = no groups.
        smooth: the values of layer groups apply at points spread evenly over depth, and layers interpolate linearly between
            them (mergekit's gradients).
        unused: coordinates that are left out because no tensor would use their values.

    Raises:
        SpaceError: the groups do not cover the layers, or there is nothing to interpolate between.
    """

    searched: tuple[SearchedParameter, ...]
    experts: tuple[str, ...]
    n_layers: int
    layer_groups: tuple[tuple[int, int], ...]
    module_groups: Mapping[str, Sequence[str]]
    smooth: bool = False
    unused: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        edges = [0, *(last for _, last in self.layer_groups)]
        starts = [first for first, _ in self.layer_groups]
        ordered = all(first < last for first, last in self.layer_groups)
        if starts != edges[:-1] or edges[-1] != self.n_layers or not ordered:
            raise SpaceError(
                f"layer_groups {[list(group) for group in self.layer_groups]} must be consecutive [first, last) ranges that cover 0 to {self.n_layers}"
            )
        if self.smooth and len(self.layer_groups) < 2:
            raise SpaceError(
                "smooth: interpolates between the values of layer groups, so it needs layer_groups of at least 2"
            )

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """The layer ranges that become slices of the recipe; a single one is the whole model."""
        return ((0, self.n_layers),) if self.smooth else self.layer_groups

    def depth(self, layer: int) -> float:
        """The relative depth of a layer, in [0, 1]."""
        return layer / max(1, self.n_layers - 1)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of the search space."""
        return tuple(
            Parameter(name, searched.low, searched.high, family=_name(searched.name, expert, None, None))
            for searched in self.searched
            for name, expert in self.of(searched).items()
        )

    @cached_property
    def gradients(self) -> tuple[tuple[str, ...], ...]:
        """The coordinates, including unused ones; those between which layers interpolate are grouped together in order of depth."""
        if not self.smooth:
            return tuple((parameter.name,) for parameter in self.parameters)
        return tuple(
            self._names(searched, expert, module)
            for searched in self.searched
            for expert in self._experts_of(searched)
            for module, _ in self._modules_of(searched)
        )

    def of(self, searched: SearchedParameter) -> dict[str, str | None]:
        """Coordinates of a parameter -> their expert (None if it does not vary over experts)."""
        every = {
            _name(searched.name, expert, layer, module): expert
            for expert in self._experts_of(searched)
            for layer in self._layers_of(searched)
            for module, _ in self._modules_of(searched)
        }
        return {name: expert for name, expert in every.items() if name not in self.unused}

    def settings(
        self, searched: SearchedParameter, values: Mapping[str, float], part: tuple[int, int], expert: str | None
    ) -> tuple[Setting, ...]:
        """The settings of a parameter in one of `slices`, for `expert` if it varies over experts."""
        owner = expert if "expert" in searched.per else None
        settings: list[Setting] = []
        for module, filters in self._modules_of(searched):
            names = self._names(searched, owner, module, None if self.smooth else part)
            used = [values[name] for name in names if name not in self.unused]
            if used:
                value = used[0] if len(used) == 1 else tuple(values.get(name, used[0]) for name in names)
                settings += [Setting(value, text) for text in filters or (None,)]
        return tuple(settings)

    def _names(
        self, searched: SearchedParameter, expert: str | None, module: str | None, part: tuple[int, int] | None = None
    ) -> tuple[str, ...]:
        """The coordinates over depth, for the layer group `part` or for all; a single one if the parameter does not vary over them."""
        layers = self._layers_of(searched)
        if part is not None and len(layers) > 1:
            layers = (layers[self.layer_groups.index(part)],)
        return tuple(_name(searched.name, expert, layer, module) for layer in layers)

    def _experts_of(self, searched: SearchedParameter) -> tuple[str | None, ...]:
        return self.experts if "expert" in searched.per else (None,)

    def _modules_of(self, searched: SearchedParameter) -> list[tuple[str | None, Sequence[str]]]:
        """(module group, its filters) for which the parameter has values; a single unnamed one if it does not vary over them."""
        groups = self.module_groups if "module_group" in searched.per else {}
        return [*groups.items()] or [(None, ())]

    def _layers_of(self, searched: SearchedParameter) -> tuple[str | None, ...]:
        """Names of the layer groups for which the parameter has values; a single None if it does not vary over them."""
        return self._layer_names if "layer_group" in searched.per else (None,)

    @cached_property
    def _layer_names(self) -> tuple[str, ...]:
        """Names of the layer groups: their layers or, with interpolation, the layer at which a value applies."""
        if not self.smooth:
            return tuple(f"{first}-{last - 1}" for first, last in self.layer_groups)
        distance = (self.n_layers - 1) / (len(self.layer_groups) - 1)
        return tuple(f"@{number * distance:.1f}".removesuffix(".0") for number in range(len(self.layer_groups)))


def _name(parameter: str, expert: str | None, layer: str | None, module: str | None) -> str:
    inner = ",".join(part for part in (expert, layer, module) if part is not None)
    return f"{parameter}[{inner}]" if inner else parameter
