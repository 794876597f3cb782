"""A grid keeps the best candidate of every cell, and its edges belong to it."""

import numpy as np
import pytest

from evomerge.archive import EliteGrid


def test_better_candidate_stays_in_a_cell() -> None:
    grid = EliteGrid([0.0], [1.0], 4)
    assert grid.add(0.5, np.array([0.3])) == 0
    assert grid.add(0.1, np.array([0.9])) == 1
    assert grid.add(0.5, np.array([0.26])) is None, "an equally good candidate must not replace it"
    assert grid.add(0.4, np.array([0.3])) is None
    assert grid.add(0.7, np.array([0.49])) == 0
    assert len(grid) == 2
    np.testing.assert_array_equal(grid.qualities, [0.7, 0.1])
    np.testing.assert_array_equal(grid.behaviours, [[0.49], [0.9]])


def test_perfect_scores_and_scores_beyond_belong_to_the_outermost_cells() -> None:
    grid = EliteGrid([0.0, 0.0], [1.0, 1.0], 10)
    first = grid.add(0.5, np.array([0.95, 0.05]))
    assert grid.add(0.6, np.array([1.0, 0.0])) == first
    assert grid.add(0.7, np.array([3.0, -2.0])) == first


@pytest.mark.parametrize(("low", "high", "cells"), [([], [], 1), ([0.0], [1.0], 5), ([0.0, 2.0], [1.0, 2.0], 5)])
def test_axis_without_extent_is_not_divided(low: list[float], high: list[float], cells: int) -> None:
    grid = EliteGrid(low, high, 5)
    assert grid.n_cells == cells
    assert grid.add(1.0, np.array(low)) == 0
    assert grid.behaviours.shape == (1, len(low))


def test_score_sums_how_far_elites_exceed_the_reference() -> None:
    grid = EliteGrid([0.0], [1.0], 4)
    assert grid.score(0.0) == 0.0
    for quality, place in ((0.5, 0.1), (0.9, 0.6), (-3.0, 0.9)):
        grid.add(quality, np.array([place]))
    assert grid.score(0.2) == pytest.approx(0.3 + 0.7)
