"""Encodings of layer stacks: parameter values -> the path of layers that the hidden state takes.

Knows names of models and numbers of layers, but nothing of weights, recipes or files. A path has three parts: the fixed first and last
layers of the `ends` model, and between them the free layers given by the encoding. Every point of a space decodes to a path: one
that is too long loses its last free layers, and one that is too short gets the ends model's own free layers, lowest first,
inserted before its other free layers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from evomerge.core import SpaceError
from evomerge.recipe.scale_range import check_scales
from evomerge.space import Parameter

SKIP, BACK = "skip", "back"
_SKIPPING, _GOING_BACK = 0.0, 1.0
"""values of these moves"""

_PRECISION = 1e-9
"""relative tolerance within which two scales count as equal"""

LAST = "last"
"""stands for the fixed last layers in the names of scales"""


@dataclass(frozen=True, slots=True)
class Step:
    """One layer of a path: layer `layer` of model `model`; the hidden state is multiplied by `scale` on entering it."""

    model: str
    layer: int
    scale: float = 1.0


@dataclass(frozen=True)
class StackFrame:
    """What all paths of a search have in common.

    Attributes:
        models: name -> layers of the model that a path may use, in order.
        ends: the model that provides embeddings, head, and the first and last layers.
        n_layers: number of layers of the ends model.
        fixed_first, fixed_last: number of its layers with which every path begins and ends.
        min_depth, max_depth: number of layers of a path, including fixed ones.
        scale_low, scale_high: bounds of the scales, 0 < low <= 1 <= high; both 1 if nothing is scaled.
        dtype: the narrowest format in which weights or hidden states are stored; limits the product of the scales.

    Raises:
        SpaceError: the settings admit no path; names the setting.
    """

    models: Mapping[str, tuple[int, ...]]
    ends: str
    n_layers: int
    fixed_first: int
    fixed_last: int
    min_depth: int
    max_depth: int
    scale_low: float
    scale_high: float
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.ends not in self.models:
            raise SpaceError(f"stacking.ends: {self.ends!r} is not one of the stacked models: {', '.join(self.models)}")
        empty = [name for name, layers in self.models.items() if not layers]
        if empty:
            raise SpaceError(f"stacking.models: no layers of {', '.join(empty)} may be used; leave it out")
        if self.fixed_first + self.fixed_last > self.n_layers:
            raise SpaceError(
                f"stacking: fixed_first {self.fixed_first} and fixed_last {self.fixed_last} are more than the {self.n_layers} layers "
                f"of {self.ends}"
            )
        if not max(1, self.fixed_first + self.fixed_last) <= self.min_depth <= self.max_depth:
            raise SpaceError(
                f"stacking: depths must satisfy fixed layers ({self.fixed_first + self.fixed_last}) <= min_depth ({self.min_depth}) <= "
                f"max_depth ({self.max_depth}), and be at least 1"
            )
        if self.min_depth > self.fixed_first + self.fixed_last + len(self.own):
            raise SpaceError(
                f"stacking.min_depth: {self.min_depth} is more than the {self.n_layers} layers of {self.ends}, with which short paths are filled up"
            )
        if not 0.0 < self.scale_low <= 1.0 <= self.scale_high:
            raise SpaceError(
                f"stacking: scales in [{self.scale_low}, {self.scale_high}] must be positive and include 1 (no scaling)"
            )
        check_scales(self.scale_low, self.scale_high, self.n_scales, self.dtype)

    @property
    def own(self) -> tuple[int, ...]:
        """The free layers of the ends model: all but the fixed ones."""
        return tuple(range(self.fixed_first, self.n_layers - self.fixed_last))

    @property
    def n_free(self) -> int:
        """Maximum number of layers between the fixed ones."""
        return self.max_depth - self.fixed_first - self.fixed_last

    @property
    def n_scales(self) -> int:
        """Maximum number of scales of a path: one on entering every free layer, and one on entering the fixed last layers."""
        return self.n_free + (1 if self.fixed_last else 0)

    def offered(self) -> list[tuple[str, int]]:
        """Every (model, layer) that may be between the fixed layers, model by model; excludes the fixed layers themselves."""
        return [
            (name, layer)
            for name, layers in self.models.items()
            for layer in layers
            if name != self.ends or layer in self.own
        ]

    def path(self, free: Sequence[Step], last_scale: float = 1.0) -> tuple[Step, ...]:
        """The complete path with these free steps, adjusted to a valid depth; `last_scale` applies on entering the fixed last layers."""
        missing = self.min_depth - self.fixed_first - self.fixed_last - len(free)
        filling = [Step(self.ends, layer) for layer in self.own[: max(0, missing)]]
        first = [Step(self.ends, layer) for layer in range(self.fixed_first)]
        start = self.n_layers - self.fixed_last
        last = [Step(self.ends, layer, last_scale if layer == start else 1.0) for layer in range(start, self.n_layers)]
        return (*first, *filling, *free[: self.n_free], *last)


class PathEncoding(ABC):
    """Parameters whose values determine the path: categorical slots and, with `scales`, the logarithms of the scales."""

    def __init__(self, frame: StackFrame, *, scales: bool) -> None:
        self.frame = frame
        self.scales = scales and frame.scale_low < frame.scale_high

    @abstractmethod
    def slots(self) -> list[Parameter]:
        """The categorical parameters, in path order."""

    @abstractmethod
    def path(self, values: Mapping[str, float]) -> tuple[Step, ...]:
        """The path of `values` (parameter -> value); never fails."""

    @abstractmethod
    def _values_of(self, free: Sequence[Step]) -> dict[str, float] | None:
        """Values of slots with which these layers are used, with the scales on entering them; None if no slot can use one of them.

        Other parameters are left out; the caller must check that the resulting path is the wanted one.
        """

    def values_of(self, path: Sequence[Step]) -> dict[str, float] | None:
        """Values that decode to this path, with scales equal up to rounding; None if none are found."""
        frame = self.frame
        start = len(path) - frame.fixed_last
        if start < frame.fixed_first:
            return None
        free = list(path[frame.fixed_first : start])
        filling = [Step(frame.ends, layer) for layer in frame.own]
        for n_filled in range(len(free) + 1):  # a path of minimum depth may begin with layers that were filled in
            if free[:n_filled] != filling[:n_filled]:
                break
            taken = free[n_filled:]
            values = self._values_of(taken)
            if values is not None:
                ending = self._scaled(self._last_way(taken), path[start]) if frame.fixed_last else {}
                values = self._unused() | values | ending
                if _are_close(self.path(values), path):
                    return values
        return None

    def _unused(self) -> dict[str, float]:
        """Values with which no slot uses a layer and all scales are 1."""
        return dict.fromkeys((parameter.name for parameter in self.parameters()), 0.0)

    def own_path(self, model: str) -> dict[str, float] | None:
        """Values whose path consists of the unscaled layers of `model` between the fixed ones; None if there are none."""
        frame = self.frame
        if not set(frame.own) <= set(frame.models[model]) or len(frame.own) > frame.n_free:
            return None
        return self.values_of(frame.path([Step(model, layer) for layer in frame.own]))

    def parameters(self) -> list[Parameter]:
        """The searched parameters: all slots, then all scales."""
        low, high = math.log(self.frame.scale_low), math.log(self.frame.scale_high)
        return [*self.slots(), *(Parameter(name, low, high) for name in self._scale_names())]

    def _scale_names(self) -> list[str]:
        """Names of the scales: one for entering the layer of each slot, and one for entering the fixed last layers, if there are any."""
        if not self.scales:
            return []
        return [f"log_{slot.name}" for slot in self.slots()] + ([f"log_{LAST}"] if self.frame.fixed_last else [])

    def _entering(self, values: Mapping[str, float], place: str) -> float:
        """The scale on entering a place: a slot's layer, `LAST`, or any other place after which a scale is named."""
        return math.exp(values[f"log_{place}"]) if self.scales else 1.0

    def _whole(self, values: Mapping[str, float], free: Sequence[Step], last: str = LAST) -> tuple[Step, ...]:
        """The complete path with the free steps `free`, and with the scale on entering the fixed last layers."""
        return self.frame.path(free, self._entering(values, last) if self.frame.fixed_last else 1.0)

    def _last_way(self, free: Sequence[Step]) -> str:
        """The place after which the scale on entering the fixed last layers is named, given these free steps."""
        return LAST

    def _scaled(self, place: str, step: Step) -> dict[str, float]:
        """Name and value of the scale parameter on entering `place`, clipped to its bounds."""
        low, high = math.log(self.frame.scale_low), math.log(self.frame.scale_high)
        return {f"log_{place}": min(max(math.log(step.scale), low), high)} if self.scales else {}


class Indicator(PathEncoding):
    """A repeated sequence of layers, each included or skipped (Akiba et al., arXiv 2403.13187, section 3.2).

    The sequence contains the offered layers of all models in order, `repeats` times; a binary parameter for each says whether it is used.
    With `matrix`, W[i, j] scales the hidden state on its way from layer i to layer j, whatever the slot; without it, each slot has
    one scale, and there is one for entering the fixed last layers.
    """

    def __init__(self, frame: StackFrame, *, repeats: int, scales: bool, matrix: bool) -> None:
        super().__init__(frame, scales=scales or matrix)
        self.repeats = repeats
        self.matrix = matrix and self.scales

    def slots(self) -> list[Parameter]:
        """See `PathEncoding.slots`."""
        return [Parameter.categorical(_take(*row), (SKIP, "take")) for row in self._row()]

    def path(self, values: Mapping[str, float]) -> tuple[Step, ...]:
        """See `PathEncoding.path`."""
        free: list[Step] = []
        before: tuple[str, int] | None = None
        for repeat, model, layer in self._row():
            if len(free) == self.frame.n_free:
                break
            slot = _take(repeat, model, layer)
            if values[slot] < 1.0:
                continue
            here = (model, layer)
            free.append(Step(*here, self._entering(values, _way(before, here) if self.matrix else slot)))
            before = here
        return self._whole(values, free, _way(before, None) if self.matrix else LAST)

    def _values_of(self, free: Sequence[Step]) -> dict[str, float] | None:
        """See `PathEncoding._values_of`: uses each layer at its next occurrence in the sequence."""
        values: dict[str, float] = {}
        row = iter(self._row())
        before: tuple[str, int] | None = None
        for step in free:
            here = (step.model, step.layer)
            slot = next((_take(*each) for each in row if each[1:] == here), None)
            if slot is None:
                return None
            values |= {slot: 1.0, **self._scaled(_way(before, here) if self.matrix else slot, step)}
            before = here
        return values

    def _last_way(self, free: Sequence[Step]) -> str:
        if not self.matrix:
            return LAST
        return _way((free[-1].model, free[-1].layer) if free else None, None)

    def _scale_names(self) -> list[str]:
        if not self.matrix:
            return super()._scale_names()
        offered = self.frame.offered()
        stops = [*offered, *([None] if self.frame.fixed_last else [])]
        return [f"log_{_way(start, stop)}" for start in [None, *offered] for stop in stops]

    def _row(self) -> list[tuple[int, str, int]]:
        """(repetition, model, layer) of every slot, in path order."""
        return [(repeat, *offer) for repeat in range(self.repeats) for offer in self.frame.offered()]


class Categorical(PathEncoding):
    """Every slot holds any layer or is skipped (the DIS space of arXiv 2502.04030 with its permutation left to the slots)."""

    def slots(self) -> list[Parameter]:
        """See `PathEncoding.slots`."""
        choices = (SKIP, *(f"{model}.{layer}" for model, layer in self.frame.offered()))
        return [Parameter.categorical(f"slot[{index}]", choices) for index in range(self.frame.n_free)]

    def path(self, values: Mapping[str, float]) -> tuple[Step, ...]:
        """See `PathEncoding.path`."""
        offered = self.frame.offered()
        free = []
        for slot in self.slots():
            choice = int(values[slot.name])
            if choice:
                model, layer = offered[choice - 1]
                free.append(Step(model, layer, self._entering(values, slot.name)))
        return self._whole(values, free)

    def _values_of(self, free: Sequence[Step]) -> dict[str, float] | None:
        """See `PathEncoding._values_of`: uses the first slots in order."""
        number_of = {offer: number for number, offer in enumerate(self.frame.offered(), start=1)}
        values: dict[str, float] = {}
        for slot, step in zip(self.slots(), free, strict=False):
            if (step.model, step.layer) not in number_of:
                return None
            values |= {slot.name: float(number_of[step.model, step.layer]), **self._scaled(slot.name, step)}
        return values


class Moves(PathEncoding):
    """A walk over the positions of a model: use some model's layer there, skip it, or go back one (arXiv 2503.21272, sec. 3).

    The walk starts after the fixed first layers and ends where the fixed last ones begin, when the moves are used up, or when
    the path is full. Going back at the start has no effect (in the paper it ends the episode with a penalty). Every stacked model must have
    as many layers as the ends model.
    """

    def __init__(self, frame: StackFrame, *, scales: bool, n_moves: int) -> None:
        super().__init__(frame, scales=scales)
        self.n_moves = n_moves

    def slots(self) -> list[Parameter]:
        """See `PathEncoding.slots`."""
        choices = (SKIP, BACK, *self.frame.models)
        return [Parameter.categorical(f"move[{index}]", choices) for index in range(self.n_moves)]

    def path(self, values: Mapping[str, float]) -> tuple[Step, ...]:
        """See `PathEncoding.path`. Choosing a model whose layer at the position may not be used is a skip."""
        frame, names = self.frame, list(self.frame.models)
        position, free = frame.fixed_first, list[Step]()
        for slot in self.slots():
            if position >= frame.n_layers - frame.fixed_last or len(free) == frame.n_free:
                break
            move = int(values[slot.name])
            if move == _GOING_BACK:
                position = max(frame.fixed_first, position - 1)
                continue
            if move >= 2 and position in frame.models[names[move - 2]]:
                free.append(Step(names[move - 2], position, self._entering(values, slot.name)))
            position += 1
        return self._whole(values, free)

    def _values_of(self, free: Sequence[Step]) -> dict[str, float] | None:
        """See `PathEncoding._values_of`: goes back or skips layers on the way to each."""
        names = list(self.frame.models)
        values: dict[str, float] = {}
        slots = iter(self.slots())
        position = self.frame.fixed_first
        for step in free:
            moves = [_SKIPPING] * (step.layer - position) + [_GOING_BACK] * (position - step.layer)
            way, here = list(islice(slots, len(moves))), next(slots, None)
            if here is None or step.model not in names:
                return None
            values |= {slot.name: move for slot, move in zip(way, moves, strict=True)}
            values |= {here.name: float(2 + names.index(step.model)), **self._scaled(here.name, step)}
            position = step.layer + 1
        return values


class Swap(PathEncoding):
    """Paths as deep as the ends model, where every free layer comes from one of the models (layer swapping, arXiv 2410.01335)."""

    def slots(self) -> list[Parameter]:
        """See `PathEncoding.slots`."""
        return [
            Parameter.categorical(f"layer[{layer}]", names)
            for layer in self.frame.own
            if len(names := self._who(layer)) > 1
        ]

    def path(self, values: Mapping[str, float]) -> tuple[Step, ...]:
        """See `PathEncoding.path`."""
        free = []
        for layer in self.frame.own:
            slot, (model, *others) = f"layer[{layer}]", self._who(layer)
            if others:
                free.append(Step([model, *others][int(values[slot])], layer, self._entering(values, slot)))
            else:
                free.append(Step(model, layer))
        return self._whole(values, free)

    def _values_of(self, free: Sequence[Step]) -> dict[str, float] | None:
        """See `PathEncoding._values_of`."""
        slots = {slot.name: slot.choices for slot in self.slots()}
        values: dict[str, float] = {}
        for step in free:
            name = f"layer[{step.layer}]"
            if name not in slots:
                continue
            if step.model not in slots[name]:
                return None
            values |= {name: float(slots[name].index(step.model)), **self._scaled(name, step)}
        return values

    def _who(self, layer: int) -> tuple[str, ...]:
        """The models whose `layer` may be used; the ends model if there are none."""
        return tuple(name for name, layers in self.frame.models.items() if layer in layers) or (self.frame.ends,)


def _are_close(path: Sequence[Step], wanted: Sequence[Step]) -> bool:
    """Whether two paths are equal up to rounding of their scales."""
    return len(path) == len(wanted) and all(
        (one.model, one.layer) == (other.model, other.layer)
        and math.isclose(one.scale, other.scale, rel_tol=_PRECISION)
        for one, other in zip(path, wanted, strict=True)
    )


def _take(repeat: int, model: str, layer: int) -> str:
    return f"take[{repeat},{model}.{layer}]"


def _way(start: tuple[str, int] | None, stop: tuple[str, int] | None) -> str:
    """Name of the scale on the way from one layer to another; None = from the fixed first layers, or to the fixed last ones."""
    left = "first" if start is None else f"{start[0]}.{start[1]}"
    return f"scale[{left}>{LAST if stop is None else f'{stop[0]}.{stop[1]}'}]"
