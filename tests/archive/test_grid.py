"""A grid keeps the best of every cell, and its edges belong to it."""

import numpy as np
import pytest

from evomerge.archive import EliteGrid


def test_the_better_one_stays_in_a_cell() -> None:
    grid = EliteGrid([0.0], [1.0], 4)
    assert grid.add(0.5, np.array([0.3])) == 0
    assert grid.add(0.1, np.array([0.9])) == 1
    assert grid.add(0.5, np.array([0.26])) is None, "as good is not better"
    assert grid.add(0.4, np.array([0.3])) is None
    assert grid.add(0.7, np.array([0.49])) == 0
    assert len(grid) == 2
    np.testing.assert_array_equal(grid.qualities, [0.7, 0.1])
    np.testing.assert_array_equal(grid.behaviours, [[0.49], [0.9]])


def test_a_perfect_score_is_in_the_last_cell_and_what_lies_beyond_in_the_outermost() -> None:
    grid = EliteGrid([0.0, 0.0], [1.0, 1.0], 10)
    first = grid.add(0.5, np.array([0.95, 0.05]))
    assert grid.add(0.6, np.array([1.0, 0.0])) == first
    assert grid.add(0.7, np.array([3.0, -2.0])) == first


@pytest.mark.parametrize(("low", "high", "cells"), [([], [], 1), ([0.0], [1.0], 5), ([0.0, 2.0], [1.0, 2.0], 5)])
def test_an_axis_without_extent_does_not_divide(low: list[float], high: list[float], cells: int) -> None:
    grid = EliteGrid(low, high, 5)
    assert grid.n_cells == cells
    assert grid.add(1.0, np.array(low)) == 0
    assert grid.behaviours.shape == (1, len(low))


def test_the_score_counts_what_elites_are_above_the_least() -> None:
    grid = EliteGrid([0.0], [1.0], 4)
    assert grid.score(0.0) == 0.0
    for quality, place in ((0.5, 0.1), (0.9, 0.6), (-3.0, 0.9)):
        grid.add(quality, np.array([place]))
    assert grid.score(0.2) == pytest.approx(0.3 + 0.7)
