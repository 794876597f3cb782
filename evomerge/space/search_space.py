"""`SearchSpace`: named parameters, real or categorical, and the map between their values and the unit cube.

Knows nothing of recipes or models: a strategy sees its dimension, a recipe template its names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.core import Json, SpaceError, fingerprint
from evomerge.space.choices import choices_at, middles_of

Conditions = tuple[tuple[int, tuple[int, ...]] | None, ...]
"""one entry per coordinate, see `SearchSpace.conditions`"""

MAX_DIMENSION = 20_000
"""Published data-flow spaces have 4,288 coordinates; above this limit none of the strategies is suitable."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter with values in [low, high].

    Attributes:
        name: unique in its space.
        low, high: bounds of a real parameter.
        choices: names of the values of a categorical parameter, at least two; its value is the index of the choice. () = real.
        family: name of a group of parameters that are likely to need similar values, such as the same weight in different layers;
            "" = none.
        used_with: a categorical parameter's name, and the indices of its choices with which this parameter has an effect; None = always.
    """

    name: str
    low: float
    high: float
    choices: tuple[str, ...] = ()
    family: str = ""
    used_with: tuple[str, tuple[int, ...]] | None = None

    @classmethod
    def categorical(cls, name: str, choices: Sequence[str]) -> "Parameter":
        """A parameter whose values are the indices of `choices`."""
        return cls(name, 0.0, float(len(choices) - 1), tuple(choices))

    def to_json(self) -> list[Json]:
        """Name, bounds and choices (if any) of the parameter, in the order of the constructor's arguments, as stored with a run."""
        choices: list[Json] = [list(self.choices)] if self.choices else []
        return [self.name, self.low, self.high, *choices]


class SearchSpace:
    """An ordered set of parameters and the map between their values and points x in [0, 1]^d.

    A real parameter has the value low + x (high - low). A categorical one with n choices has the value floor(x n), the index of
    a choice, which is represented by the middle of its interval. A strategy that knows only real coordinates therefore searches a
    step function, as in the published relaxations (arXiv 2403.13187).

    Raises:
        SpaceError: there are no or too many parameters, a name appears twice, bounds are not finite with low < high, or a
            categorical parameter has a single choice.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        if not parameters:
            raise SpaceError(
                "the search space has no parameters: nothing would be searched. Give at least one parameter with low < high"
            )
        if len(parameters) > MAX_DIMENSION:
            raise SpaceError(
                f"the search space has {len(parameters)} parameters; the limit is {MAX_DIMENSION}. Use fewer layer or module groups"
            )
        seen: set[str] = set()
        for parameter in parameters:
            if parameter.name in seen:
                raise SpaceError(f"parameter {parameter.name!r} appears twice in the search space")
            seen.add(parameter.name)
            if not (parameter.low < parameter.high and np.isfinite(parameter.high - parameter.low)):
                raise SpaceError(
                    f"parameter {parameter.name!r}: bounds [{parameter.low}, {parameter.high}] must be finite with low < high (and so must their distance)"
                )
        self.parameters = tuple(parameters)
        self._low = np.array([parameter.low for parameter in parameters])
        self._high = np.array([parameter.high for parameter in parameters])
        self._width = self._high - self._low
        self._choices = np.array([len(parameter.choices) for parameter in parameters])

    @property
    def dimension(self) -> int:
        """Number of parameters d."""
        return len(self.parameters)

    @property
    def choices(self) -> tuple[int, ...]:
        """(d,): the number of choices of every coordinate, 0 for real ones."""
        return tuple(len(parameter.choices) for parameter in self.parameters)

    @property
    def families(self) -> tuple[int, ...]:
        """(d,): the index of every coordinate's family, numbered in order of appearance; a parameter without one has its own."""
        keys = [(parameter.family, "" if parameter.family else parameter.name) for parameter in self.parameters]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return tuple(numbers[key] for key in keys)

    @property
    def conditions(self) -> "Conditions":
        """(d,): for every coordinate, the index of the categorical coordinate and the choices with which it has an effect; None = always."""
        numbers = {parameter.name: number for number, parameter in enumerate(self.parameters)}
        return tuple(
            None if item.used_with is None else (numbers[item.used_with[0]], item.used_with[1])
            for item in self.parameters
        )

    @property
    def fingerprint(self) -> str:
        """Equal for spaces with the same names, bounds and choices in the same order."""
        return fingerprint([parameter.to_json() for parameter in self.parameters])

    def encode(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        """The point (d,) in [0, 1]^d of `values`.

        Raises:
            SpaceError: a parameter is missing, unknown or out of bounds, or a value is not a choice of a categorical parameter.
        """
        names = [parameter.name for parameter in self.parameters]
        if set(values) != set(names):
            missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
            raise SpaceError(f"values do not fit the space; missing: {missing or 'none'}; unknown: {unknown or 'none'}")
        array = np.array([values[name] for name in names])
        point = (array - self._low) / self._width
        discrete = self._choices > 0
        point[discrete] = middles_of(array[discrete], self._choices[discrete])
        outside = ~((array >= self._low) & (array <= self._high)) | discrete & (array % 1.0 != 0.0)
        if outside.any():
            worst = self.parameters[int(np.argmax(outside))]
            raise SpaceError(
                f"parameter {worst.name!r}: value {values[worst.name]} is not one of {', '.join(map(str, range(len(worst.choices))))}"
                if worst.choices
                else f"parameter {worst.name!r}: value {values[worst.name]} is outside [{worst.low}, {worst.high}]"
            )
        return np.asarray(point, dtype=np.float64)

    def decode(self, point: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
        """Parameter values at `point` (d,) in [0, 1]^d.

        Raises:
            SpaceError: wrong length, or a coordinate outside [0, 1] or NaN.
        """
        array = np.asarray(point, dtype=np.float64)
        if array.shape != (self.dimension,):
            raise SpaceError(f"a point of this space has shape ({self.dimension},), got {array.shape}")
        if not ((array >= 0) & (array <= 1)).all():
            raise SpaceError("every coordinate of a point must be in [0, 1]")
        values = np.minimum(self._low + array * self._width, self._high)  # rounding may exceed the bound
        discrete = self._choices > 0
        values[discrete] = choices_at(array[discrete], self._choices[discrete])
        return {parameter.name: float(value) for parameter, value in zip(self.parameters, values, strict=True)}

    def named(self, point: Sequence[float] | NDArray[np.float64]) -> dict[str, float | str]:
        """Like `decode`, with the names of choices instead of their indices."""
        values = self.decode(point)
        return {
            item.name: item.choices[int(values[item.name])] if item.choices else values[item.name]
            for item in self.parameters
        }
