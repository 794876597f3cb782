"""Where each checkpoint tensor lives in a running engine, found by sending tags through the engine's own weight loader.

Engines fuse tensors (q, k and v; gate and up; experts), pad vocabularies and share tied tensors. Instead of encoding knowledge of each
architecture, every checkpoint tensor is replaced by tags, and what arrives in the parameters is read back:

1. constants: which elements a load writes at all (it does not write padding or buffers);
2. the tensor's number: which rectangles of a parameter come from which tensor;
3. the row, column, ... index: which part of the tensor each rectangle holds, and in which order.

Numbers are split into digits that the narrowest parameter dtype represents exactly (bfloat16: integers up to 256), one load per
digit. A loader that permutes, transposes, scales or quantises does not return the tags in order. Loading ones and twos shows which tensors
it does this to: they are refused by name or, if the caller asks for it, kept in separate buffers and passed through the engine's loader.

Knows nothing of vLLM, of models, or of files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import torch

from evomerge.core import EngineError
from evomerge.plan import Region

Load = Callable[[Iterator[tuple[str, torch.Tensor]]], object]
"""An engine's weight loader: takes (checkpoint name, tensor) pairs and writes them into the live parameters."""

_EXACT_INTEGERS = {torch.float32: 1 << 24, torch.float64: 1 << 24, torch.bfloat16: 1 << 8, torch.float16: 1 << 11}
"""Largest integer up to which the dtype is exact; other dtypes are quantised weights."""


class EngineLayout:
    """The live parameters of an engine, addressed by checkpoint tensor names (a `WeightTarget`).

    Attributes:
        ignored: checkpoint tensors that the engine does not keep (such as the output layer of a tied model).
        reloaded: buffers for the checkpoint tensors that the engine keeps in another form; `settle` passes them to its loader.
    """

    def __init__(
        self,
        regions: Mapping[str, Sequence[Region]],
        ignored: Sequence[str],
        reloaded: Mapping[str, torch.Tensor] | None = None,
        load: Load | None = None,
    ) -> None:
        self._regions = regions
        self.ignored = tuple(ignored)
        self.reloaded = reloaded or {}
        self._load = load

    def names(self) -> Sequence[str]:
        """The tensors that the engine holds, in checkpoint order."""
        return tuple(self._regions)

    def regions(self, tensor: str) -> Sequence[Region]:
        """The places of `tensor`. Raises KeyError if the engine does not hold it."""
        return self._regions[tensor]

    def fill(self, tensor_of: Callable[[str], torch.Tensor]) -> None:
        """Write checkpoint tensors into their places."""
        for name, regions in self._regions.items():
            tensor = tensor_of(name)
            for region in regions:
                region.view.copy_(tensor[region.index])
        self.settle()

    def settle(self) -> None:
        """Pass the `reloaded` tensors through the engine's loader. Call it after every write."""
        if self.reloaded and self._load is not None:
            self._load(iter(self.reloaded.items()))


@dataclass(slots=True)
class _Cell:
    """A rectangle of one parameter that is filled from one tensor; `view` has that tensor's number of dimensions."""

    parameter: str
    tensor: str
    view: torch.Tensor
    coordinates: list[torch.Tensor] = field(default_factory=list)
    """per dimension: the tensor index that each index of the view came from (int64, on the CPU)"""


def discover_layout(
    parameters: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    load: Load,
    *,
    whole: bool = True,
    reload: bool = False,
) -> EngineLayout:
    """Find the places of all checkpoint tensors. Overwrites the parameters; the caller must restore them.

    Args:
        parameters: live parameters and buffers by name, each storage once.
        shapes: checkpoint tensor name -> shape, for everything that `load` accepts.
        load: the engine's weight loader.
        whole: require that every tensor the engine holds is held completely; False for one shard of a model.
        reload: allow tensors that are not held as plain blocks, provided that `load` also accepts a subset of the tensors: they get
            buffers of their own (`EngineLayout.reloaded`).

    Raises:
        EngineError: a parameter's dtype is not a plain float, or it is not made of rectangles of checkpoint tensors in their own
            order; names the parameter and the tensor. With `reload`, the latter only if elements are computed from several tensors together
            or a load of these tensors alone gives something else.
    """
    probe = _Probe(parameters, shapes, load)
    untouched = probe.find_untouched()
    cells = probe.find_cells(untouched)
    probe.find_coordinates(cells)
    probe.find_order(cells)
    if probe.odd and not reload:
        raise _refused(*next(iter(probe.odd.items())))
    reloaded = probe.find_reloaded(cells, untouched) if probe.odd else {}
    plain = [cell for cell in cells if cell.parameter not in probe.odd and cell.tensor not in reloaded]
    return _as_layout(plain, shapes, reloaded, load, whole=whole)


class _Probe:
    """Sends tags and reads them back.

    Attributes:
        odd: parameter that is not made of plain blocks -> a tensor for which this was seen, "?" if unknown.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], load: Load
    ) -> None:
        self._parameters = {name: value for name, value in parameters.items() if value.is_floating_point()}
        self._shapes = shapes
        self._load = load
        self.odd: dict[str, str] = {}
        written = {value.dtype for value in self._parameters.values()}
        for name, value in parameters.items():
            if isinstance(value, torch.nn.Parameter) and value.dtype not in _EXACT_INTEGERS:
                raise EngineError(
                    f"engine parameter {name!r} has dtype {value.dtype}: quantised weights cannot be replaced in place; "
                    "use an unquantised model and dtype float32, bfloat16 or float16"
                )
        self._base = min((_EXACT_INTEGERS[dtype] for dtype in written if dtype in _EXACT_INTEGERS), default=1 << 8)
        self._device = next(iter(self._parameters.values())).device if self._parameters else torch.device("cpu")

    def _n_digits(self, count: int) -> int:
        digits, reach = 1, self._base
        while reach < count:
            digits, reach = digits + 1, reach * self._base
        return digits

    def _digit(self, number: int | torch.Tensor, digit: int) -> torch.Tensor:
        """Digit `digit` of `number`, plus one, because loaders write 0 into padding."""
        tagged: torch.Tensor = torch.as_tensor(number, device=self._device) // self._base**digit % self._base + 1
        return tagged

    def _send(self, tag_of: Callable[[int, str, tuple[int, ...]], torch.Tensor]) -> None:
        self._load(
            (name, tag_of(number, name, shape).to(torch.float32).expand(shape))
            for number, (name, shape) in enumerate(self._shapes.items())
        )

    def find_untouched(self) -> dict[str, torch.Tensor]:
        """Parameter name -> mask of elements that no load writes, for parameters with such elements. Marks parameters that changed the sent values as odd."""
        self._send(lambda number, name, shape: torch.ones((), device=self._device))
        others = {name: value.clone() for name, value in self._parameters.items() if not bool((value == 1).all())}
        self._send(lambda number, name, shape: torch.full((), 2.0, device=self._device))
        untouched = {}
        for name, value in self._parameters.items():
            before = others.get(name, torch.ones((), device=value.device))
            same = (value == before) | (value.isnan() & before.isnan())
            if not bool((same | ((before == 1) & (value == 2))).all()):
                self.odd[name] = "?"
            elif bool(same.any()):
                untouched[name] = same
        return untouched

    def find_cells(self, untouched: Mapping[str, torch.Tensor]) -> list[_Cell]:
        """Split every parameter where the tensor number changes, and read the number of each piece."""
        n_digits = self._n_digits(len(self._shapes))
        touched = [
            name
            for name in self._parameters
            if name not in self.odd and (name not in untouched or not bool(untouched[name].all()))
        ]
        cuts = {name: [set[int]() for _ in self._parameters[name].shape] for name in touched}
        for digit in range(n_digits):
            self._send(lambda number, name, shape, digit=digit: self._digit(number, digit))  # type: ignore[misc]
            for name in touched:
                value = self._parameters[name]
                if name in untouched:
                    value = value.masked_fill(untouched[name], 0)
                for dimension, found in enumerate(cuts[name]):
                    found.update(_changes(value, dimension))
        corners = {name: _boxes(self._parameters[name].shape, cuts[name]) for name in touched}
        numbers = {(name, i): 0 for name in touched for i in range(len(corners[name]))}
        for digit in reversed(range(n_digits)):
            if digit != n_digits - 1:  # the last digit sent is still there
                self._send(lambda number, name, shape, digit=digit: self._digit(number, digit))  # type: ignore[misc]
            for (name, i), number in numbers.items():
                corner = tuple(part.start for part in corners[name][i])
                numbers[name, i] = number * self._base + int(self._parameters[name][corner].item()) - 1
        cells = []
        names = list(self._shapes)
        for (name, i), number in numbers.items():
            box = corners[name][i]
            if name in untouched and bool(untouched[name][tuple(part.start for part in box)]):
                continue
            cell = self._cell(name, names[number] if 0 <= number < len(names) else "?", box)
            if cell is not None:
                cells.append(cell)
        return cells

    def _cell(self, parameter: str, tensor: str, box: tuple[slice, ...]) -> _Cell | None:
        view = self._parameters[parameter][box]
        n_dimensions = len(self._shapes.get(tensor, ()))
        # Stacked experts: the leading dimensions of the parameter are not dimensions of the checkpoint tensor.
        while view.ndim > n_dimensions and view.shape[0] == 1:
            view = view[0]
        if tensor not in self._shapes or view.ndim != n_dimensions:
            self.odd.setdefault(parameter, tensor)
            return None
        return _Cell(parameter, tensor, view)

    def find_coordinates(self, cells: Sequence[_Cell]) -> None:
        """Fill `coordinates` of every cell. Marks parameters as odd whose rows (columns, ...) are not rows (columns, ...) of their tensor."""
        for dimension in range(max((len(shape) for shape in self._shapes.values()), default=0)):
            longest = max(shape[dimension] for shape in self._shapes.values() if len(shape) > dimension)
            concerned = [cell for cell in cells if cell.view.ndim > dimension]
            for cell in concerned:
                cell.coordinates.append(torch.zeros(cell.view.shape[dimension], dtype=torch.int64))
            for digit in range(self._n_digits(longest)):

                def tag(
                    number: int, name: str, shape: tuple[int, ...], d: int = dimension, k: int = digit
                ) -> torch.Tensor:
                    if len(shape) <= d:
                        return torch.ones((), device=self._device)
                    index = self._digit(torch.arange(shape[d], device=self._device), k)
                    return index.view([-1 if i == d else 1 for i in range(len(shape))])

                self._send(tag)
                for cell in concerned:
                    profile = cell.view[tuple(slice(None) if i == dimension else 0 for i in range(cell.view.ndim))]
                    shaped = profile.view([-1 if i == dimension else 1 for i in range(cell.view.ndim)])
                    if not bool((cell.view == shaped).all()):
                        self.odd.setdefault(cell.parameter, cell.tensor)
                    digits = profile.to("cpu", torch.int64) - 1
                    cell.coordinates[dimension] += digits * self._base**digit

    def find_order(self, cells: Sequence[_Cell]) -> None:
        """Mark parameters as odd whose rows (columns, ...) are not in their tensor's order."""
        for cell in cells:
            for coordinates in cell.coordinates:
                first = int(coordinates[0])
                if not torch.equal(coordinates, torch.arange(first, first + len(coordinates))):
                    self.odd.setdefault(cell.parameter, cell.tensor)

    def find_reloaded(self, cells: Sequence[_Cell], untouched: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that the odd parameters are made of -> a buffer for each, after checking that the loader accepts these alone.

        Raises:
            EngineError: an element depends on several tensors together, or the loader, given these tensors alone, writes different values.
        """
        names = list(self._shapes)
        held: dict[str, torch.Tensor] = {}
        for parameter, numbers in self._dependence().items():
            value = self._parameters[parameter]
            for number in torch.bincount(numbers.flatten() + 1).nonzero().flatten().tolist():
                if number > len(names):
                    raise _refused(parameter, self.odd[parameter])
                if number:
                    name = names[number - 1]
                    dtype = torch.promote_types(value.dtype, held[name].dtype) if name in held else value.dtype
                    held[name] = torch.empty(self._shapes[name], dtype=dtype, device=value.device)
        reloaded = {name: held[name] for name in names if name in held}
        self._check_alone(reloaded, {cell.parameter for cell in cells if cell.tensor in reloaded}, untouched)
        return reloaded

    def _dependence(self) -> dict[str, torch.Tensor]:
        """Odd parameter -> for each element, the number of the tensor it depends on (int32); -1 = none, the number of tensors = several.

        Each tensor is sent as ones or twos according to the bits of its number, and then to their complement.
        """
        count = len(self._shapes)
        n_bits = count.bit_length()
        self._send(lambda number, name, shape: torch.ones((), device=self._device))
        ones = {name: self._parameters[name].clone() for name in self.odd}
        found = {name: torch.zeros(value.shape, dtype=torch.int32, device=value.device) for name, value in ones.items()}
        n_unlike = {name: torch.zeros_like(value, dtype=torch.int8) for name, value in ones.items()}
        for bit in range(n_bits):
            changed = []
            for sent in (1, 0):

                def tag(number: int, name: str, shape: tuple[int, ...], k: int = bit, s: int = sent) -> torch.Tensor:
                    return torch.full((), 2.0 if (number + 1) >> k & 1 == s else 1.0, device=self._device)

                self._send(tag)
                changed.append({name: self._parameters[name] != value for name, value in ones.items()})
            for name in ones:
                found[name] += changed[0][name].int() << bit
                n_unlike[name] += (changed[0][name] != changed[1][name]).to(torch.int8)
        numbers = {}
        for name in ones:
            never = (found[name] == 0) & (n_unlike[name] == 0)
            numbers[name] = torch.where((n_unlike[name] == n_bits) | never, found[name] - 1, count)
        return numbers

    def _check_alone(
        self, reloaded: Mapping[str, torch.Tensor], concerned: set[str], untouched: Mapping[str, torch.Tensor]
    ) -> None:
        """Check that the loader, given these tensors alone, writes what it writes when given all, and nothing else.

        Args:
            reloaded: a buffer for each tensor.
            concerned: parameters that hold some of the tensors as plain blocks.
            untouched: as returned by `find_untouched`.

        Raises:
            EngineError: naming the parameter.
        """

        def tag(number: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            size = torch.Size(shape).numel()
            return ((torch.arange(size, device=self._device) + number) % 7 + 1).view(shape)

        self._send(tag)
        expected = {parameter: self._parameters[parameter].clone() for parameter in self.odd}
        for number, (name, shape) in enumerate(self._shapes.items()):
            if name in reloaded:
                reloaded[name].copy_(tag(number, name, shape))
        self._send(lambda number, name, shape: torch.ones((), device=self._device))
        self._load(iter(reloaded.items()))
        for parameter, value in self._parameters.items():
            if parameter in expected:
                same = torch.equal(value.nan_to_num(), expected[parameter].nan_to_num())
            else:
                left = value == 1
                same = parameter in concerned or bool((left | untouched.get(parameter, left)).all())
            if not same:
                raise _refused(parameter, self.odd.get(parameter, "?"))


def _as_layout(
    cells: Sequence[_Cell],
    shapes: Mapping[str, tuple[int, ...]],
    reloaded: Mapping[str, torch.Tensor],
    load: Load,
    *,
    whole: bool,
) -> EngineLayout:
    regions: dict[str, list[Region]] = {
        name: [Region(tuple(slice(0, size) for size in value.shape), value)] for name, value in reloaded.items()
    }
    for cell in cells:
        index = []
        for coordinates in cell.coordinates:
            start = int(coordinates[0])
            index.append(slice(start, start + len(coordinates)))
        regions.setdefault(cell.tensor, []).append(Region(tuple(index), cell.view))
    for tensor, found in regions.items():
        held = sum(region.view.numel() for region in found)
        size = torch.Size(shapes[tensor]).numel()
        if whole and held < size:
            raise EngineError(
                f"the engine keeps only {held} of the {size} elements of checkpoint tensor {tensor!r} in parameters that can "
                "be replaced; the tensor may be sharded over several processes or packed by a kernel"
            )
    ordered = {name: tuple(regions[name]) for name in shapes if name in regions}
    return EngineLayout(ordered, [name for name in shapes if name not in regions], reloaded, load)


def _changes(value: torch.Tensor, dimension: int) -> list[int]:
    """Indices along `dimension` at which any element of `value` differs from the one at the previous index."""
    n = value.shape[dimension]
    if n < 2:
        return []
    differs = value.narrow(dimension, 1, n - 1) != value.narrow(dimension, 0, n - 1)
    others = [i for i in range(value.ndim) if i != dimension]
    along = differs.any(dim=others) if others else differs
    return [i + 1 for i in along.nonzero().flatten().tolist()]


def _boxes(shape: Sequence[int], cuts: Sequence[set[int]]) -> list[tuple[slice, ...]]:
    """The pieces of an array of `shape` cut at `cuts` along each dimension."""
    parts = [
        [slice(first, last) for first, last in pairwise([0, *sorted(found), size])]
        for size, found in zip(shape, cuts, strict=True)
    ]
    return list(product(*parts))


def _refused(parameter: str, tensor: str) -> EngineError:
    return EngineError(
        f"engine parameter {parameter!r} does not hold checkpoint tensor {tensor!r} as plain blocks in its own order (it is "
        "permuted, transposed, quantised or computed), so its weights cannot be replaced in place. Try the other engine "
        "(engine.kind: transformers or vllm)"
    )
