"""Parts of tensors as equally long ranges of flat elements, compared with NumPy's indexing."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evomerge.weights.windows import Window, places_in, shape_of, whole, window_of


@st.composite
def parts(draw):
    """A shape, and slices of its leading dimensions."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    index = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        first = draw(st.integers(0, size))
        index.append(slice(first, draw(st.integers(first, size))))
    return shape, tuple(index)


@given(parts())
def test_window_covers_the_same_elements_as_numpy(case):
    shape, index = case
    flat = np.arange(math.prod(shape)).reshape(shape)
    window = window_of(index, shape)
    assert shape_of(index, shape) == flat[index].shape
    if window is None:
        assert len(shape) > 2  # rows and columns of a matrix always form ranges
        return
    starts = window.start + window.pitch * np.arange(window.n_stretches)
    held = (starts[:, None] + np.arange(window.length)).reshape(-1)
    assert np.array_equal(held, flat[index].reshape(-1))
    assert window.n_elements == held.size
    elements = [*range(flat.size + 1), 2**62]
    assert [window.place(element) for element in elements] == [np.count_nonzero(held < element) for element in elements]
    windows = np.array([window, whole(flat.size)])
    places = [[each.place(element) for element in elements] for each in (window, whole(flat.size))]
    assert places_in(windows[:, None], np.array([elements, elements])).tolist() == places


def test_rows_columns_and_stacks_are_windows():
    assert window_of((slice(2, 4),), (8, 10)) == Window(20, 20, 20, 1)
    assert window_of((slice(None), slice(5, 10)), (8, 10)) == Window(5, 5, 10, 8)
    assert window_of((slice(0, 8), slice(0, 10)), (8, 10)) == whole(80)
    assert window_of((slice(1, 3), slice(0, 8), slice(5, 10)), (4, 8, 10)) == Window(85, 5, 10, 16)
    assert window_of((slice(1, 3), slice(2, 4)), (4, 8, 10)) == Window(100, 20, 80, 2)
    assert window_of((slice(1, 2), slice(2, 4), slice(0, 5)), (4, 8, 10)) == Window(100, 5, 10, 2)
    assert window_of((slice(0, 2), slice(0, 2), slice(0, 2)), (4, 8, 10)) is None
    assert window_of((slice(0, 8, 2),), (8,)) is None
    assert window_of((), ()) == whole(1)


def test_part_outside_a_tensor_has_no_shape():
    assert shape_of((slice(0, 9),), (8,)) is None
    assert shape_of((slice(0, 8), slice(0, 1)), (8,)) is None
    assert window_of((slice(0, 8), slice(0, 1)), (8,)) is None
