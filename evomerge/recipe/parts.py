"""The parts of a recipe: parameter settings, sources and slices. Plain, self-validating data."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from evomerge.core import RecipeError

ParameterValue = float | bool | str


@dataclass(frozen=True, slots=True)
class Setting:
    """One conditional value of a parameter.

    Attributes:
        value: a scalar, or a gradient over depth (a tuple): numbers are interpolated linearly over the slice's layers; for switches,
            the last entry reached applies.
        filter: substring of the tensor names it applies to; None or "*" = all.
    """

    value: ParameterValue | tuple[float | bool, ...]
    filter: str | None = None

    def __post_init__(self) -> None:
        if self.filter == "":  # contained in every name, like "*"
            object.__setattr__(self, "filter", None)
        if isinstance(self.value, tuple):
            if not self.value:
                raise RecipeError("a parameter's gradient is an empty list; give at least one number")
            object.__setattr__(self, "value", tuple(map(_entry, self.value)))
        elif not isinstance(self.value, bool | str):
            object.__setattr__(self, "value", _finite(self.value))

    def number(self, depth: float) -> float:
        """The numeric value at `depth` in [0, 1]; a gradient's entries are spread evenly over [0, 1]."""
        if not isinstance(self.value, tuple):
            return float(self.value)
        scaled = depth * (len(self.value) - 1)
        left = int(scaled)
        right = min(len(self.value) - 1, left + 1)
        share = scaled - left
        return (1 - share) * self.value[left] + share * self.value[right]

    def switch(self, depth: float) -> bool:
        """The boolean value at `depth`; for a gradient, the last entry reached."""
        if not isinstance(self.value, tuple):
            return bool(self.value)
        return bool(self.value[int(depth * (len(self.value) - 1))])


Parameters = Mapping[str, tuple[Setting, ...]]
"""parameter name -> settings in order; the first whose filter matches applies, and if none does, the next level is tried"""


@dataclass(frozen=True, slots=True)
class Source:
    """One model (or a range of its layers) in a slice.

    Attributes:
        model: a folder; in a file also ORG/NAME in the hub's cache, or the name of another document.
        layer_range: layers [first, last) of the model; None = all of them (mergekit's `models:` form).
        parameters: settings for this source only.
        revision: pinned hub revision.
        lora: adapter folder merged into the model before anything else.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    revision: str | None = None
    lora: str | None = None

    def __post_init__(self) -> None:
        if self.layer_range is not None:
            first, last = self.layer_range
            if not 0 <= first < last:
                raise RecipeError(f"layer_range [{first}, {last}] of {self.model}: expected 0 <= first < last")

    @property
    def key(self) -> str:
        """The model's name in plans and weight pools: mergekit's `model@revision+lora`."""
        return self.model + (f"@{self.revision}" if self.revision else "") + (f"+{self.lora}" if self.lora else "")

    def moved(self, folder: Callable[[str], str]) -> "Source":
        """The source with `folder` applied to the paths of its model and adapter."""
        return replace(self, model=folder(self.model), lora=None if self.lora is None else folder(self.lora))


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive output layers made from the same ranges of sources.

    Attributes:
        sources: the merged sources.
        parameters: settings for this slice only.
        module: for models of several modules, mergekit's name of the module that the slice belongs to; None = the whole model.
        base: key of the base model for this slice only; None = the recipe's.
    """

    sources: tuple[Source, ...]
    parameters: Parameters = field(default_factory=dict)
    module: str | None = None
    base: str | None = None


def joined(first: Parameters, then: Parameters) -> dict[str, tuple[Setting, ...]]:
    """Combine two levels of settings: those of `first` are tried before those of `then`."""
    return {name: (*first.get(name, ()), *then.get(name, ())) for name in dict.fromkeys([*first, *then])}


def _entry(value: float | bool) -> float | bool:
    return value if isinstance(value, bool) else _finite(value)


def _finite(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise RecipeError(f"a parameter's value must be a finite number, got {value!r}")
    return float(value)
