"""What a recipe is made of: settings of parameters, sources, slices. Plain data that checks itself."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from evomerge.core import RecipeError

ParameterValue = float | bool | str


@dataclass(frozen=True, slots=True)
class Setting:
    """One conditional value of a parameter.

    Attributes:
        value: a scalar, or a gradient over depth (a tuple): numbers are interpolated linearly over the slice's layers, of switches
            the last one that is reached holds.
        filter: substring of the tensor names it holds for; None or "*" = all.
    """

    value: ParameterValue | tuple[float | bool, ...]
    filter: str | None = None

    def __post_init__(self) -> None:
        if self.filter == "":  # in every name, as "*"
            object.__setattr__(self, "filter", None)
        if isinstance(self.value, tuple):
            if not self.value:
                raise RecipeError("a parameter's gradient is an empty list; give at least one number")
            object.__setattr__(self, "value", tuple(map(_entry, self.value)))
        elif not isinstance(self.value, bool | str):
            object.__setattr__(self, "value", _finite(self.value))

    def number(self, depth: float) -> float:
        """The value of a number at `depth` in [0, 1]; a gradient's entries are spread evenly over [0, 1]."""
        if not isinstance(self.value, tuple):
            return float(self.value)
        scaled = depth * (len(self.value) - 1)
        left = int(scaled)
        right = min(len(self.value) - 1, left + 1)
        share = scaled - left
        return (1 - share) * self.value[left] + share * self.value[right]

    def switch(self, depth: float) -> bool:
        """The value of a switch at `depth`: of a gradient the last entry that is reached."""
        if not isinstance(self.value, tuple):
            return bool(self.value)
        return bool(self.value[int(depth * (len(self.value) - 1))])


Parameters = Mapping[str, tuple[Setting, ...]]
"""parameter name -> settings in order; the first whose filter matches wins, no match falls through to the next level"""


@dataclass(frozen=True, slots=True)
class Source:
    """One model (or a range of its layers) in a slice.

    Attributes:
        model: a folder; in a file also ORG/NAME of the hub's cache, or the name of another document.
        layer_range: layers [first, last) of the model; None = all of them (mergekit's `models:` form).
        parameters: settings for this source alone.
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
        """What plans and weight pools call this model: mergekit's `model@revision+lora`."""
        return self.model + (f"@{self.revision}" if self.revision else "") + (f"+{self.lora}" if self.lora else "")

    def moved(self, folder: Callable[[str], str]) -> "Source":
        """The source with its model and adapter in `folder` of where they are."""
        return replace(self, model=folder(self.model), lora=None if self.lora is None else folder(self.lora))


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive output layers made from the same ranges of sources.

    Attributes:
        sources: what they are made of.
        parameters: settings for this slice alone.
        module: the part of a model of several modules that the slice belongs to (mergekit's name of it); None = the whole model.
        base: key of the base model of this slice alone; None = the recipe's.
    """

    sources: tuple[Source, ...]
    parameters: Parameters = field(default_factory=dict)
    module: str | None = None
    base: str | None = None


def joined(first: Parameters, then: Parameters) -> dict[str, tuple[Setting, ...]]:
    """Two levels of settings as one: those of `first` are tried before those of `then`."""
    return {name: (*first.get(name, ()), *then.get(name, ())) for name in dict.fromkeys([*first, *then])}


def _entry(value: float | bool) -> float | bool:
    return value if isinstance(value, bool) else _finite(value)


def _finite(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise RecipeError(f"a parameter's value must be a finite number, got {value!r}")
    return float(value)
