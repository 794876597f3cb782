"""`Window`: the elements of a part of a tensor, such as the shard of one process of a tensor-parallel engine. Knows nothing of merging."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Window(NamedTuple):
    """Elements of a flat tensor, in order: stretches of equal length at equal distances. A range of rows of a matrix is one stretch, a range of columns
    has one stretch per row.

    Attributes:
        start: the first element.
        length: number of elements of a stretch.
        pitch: distance between the beginnings of consecutive stretches; `length` if there is only one.
        n_stretches: number of stretches.
    """

    start: int
    length: int
    pitch: int
    n_stretches: int

    @property
    def n_elements(self) -> int:
        """Number of elements of the window."""
        return self.length * self.n_stretches

    def place(self, element: int) -> int:
        """The number of elements of the window that come before the tensor's flat `element`."""
        if element <= self.start or not self.n_elements:
            return 0
        row, column = divmod(element - self.start, self.pitch)
        return min(row * self.length + min(column, self.length), self.n_elements)


def places_in(windows: NDArray[np.int64], elements: NDArray[np.int64]) -> NDArray[np.int64]:
    """Vectorised `Window.place` for windows (..., 4), given by their fields, and elements, which broadcast."""
    start, length, pitch, n_stretches = np.moveaxis(windows, -1, 0)
    row, column = np.divmod(elements - start, np.maximum(pitch, 1))
    before = np.minimum(row * length + np.minimum(column, length), length * n_stretches)
    return np.where(elements > start, before, 0)


def whole(n_elements: int) -> Window:
    """All of a tensor."""
    return Window(0, n_elements, n_elements, 1)


def shape_of(index: Sequence[slice], shape: Sequence[int]) -> tuple[int, ...] | None:
    """Shape of the part of a tensor of `shape` selected by `index`; None if it has too many dimensions or is out of range."""
    if len(index) > len(shape) or any((part.stop or 0) > size for part, size in zip(index, shape, strict=False)):
        return None
    taken = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=False)]
    return (*taken, *shape[len(taken) :])


def window_of(index: Sequence[slice], shape: Sequence[int]) -> Window | None:
    """The part of a tensor of `shape` selected by `index`; None if it does not consist of equally spaced stretches (such as a block of a stack of matrices) or has steps."""
    if len(index) > len(shape):
        return None
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=False)]
    if bounds == [(0, size, 1) for size in shape]:
        return whole(math.prod(shape))
    if any(step != 1 for _, _, step in bounds):
        return None
    sides = [(first, max(last - first, 0)) for first, last, _ in bounds]
    sides += [(0, size) for size in shape[len(sides) :]]
    n_elements = math.prod(taken for _, taken in sides)
    if not sides or not n_elements:
        return whole(n_elements)
    inner = max((d for d, (_, taken) in enumerate(sides) if taken != shape[d]), default=0)
    row = math.prod(shape[inner + 1 :])
    (first, taken), pitch = sides[inner], shape[inner] * row
    start, count, width, is_cut = first * row, 1, pitch, False
    for (outer_first, outer_taken), size in zip(reversed(sides[:inner]), reversed(shape[:inner]), strict=True):
        if is_cut and outer_taken != 1:
            return None
        start, count, width = start + outer_first * width, count * outer_taken, width * size
        is_cut = is_cut or outer_taken != size
    return Window(start, taken * row, pitch if count > 1 else taken * row, count)
