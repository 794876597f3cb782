"""Competition for items against its definition, written out in loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.archive import attraction, coverage, resource_fitness, solve_rate_entropy

tables = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.sampled_from([0.0, 0.25, 1.0]))


@given(tables, st.sampled_from([0.0, 1.0, 2.0]))
def test_fitness_is_the_papers_sum(scores, alpha):
    for member in range(len(scores)):
        expected = sum(
            scores[member, j] * max(scores[:, j]) / (sum(scores[:, j]) ** alpha + 1e-12) for j in range(scores.shape[1])
        )
        assert resource_fitness(scores, alpha)[member] == pytest.approx(expected, abs=1e-9)


@given(tables)
def test_attraction_is_the_papers_sum(scores):
    gains = attraction(scores, 0)
    assert gains[0] == 0.0
    for member in range(1, len(scores)):
        expected = sum(
            max(scores[:, j]) / (sum(scores[:, j]) + 1e-12) * max(scores[member, j] - scores[0, j], 0.0)
            for j in range(scores.shape[1])
        )
        assert gains[member] == pytest.approx(expected, abs=1e-9)


def test_a_lonely_solver_earns_more_than_a_crowd():
    fitness = resource_fitness([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert np.argmax(fitness) == 3
    assert fitness.sum() == pytest.approx(3.0)
    plain = resource_fitness([[1, 1, 0], [0, 0, 1]], alpha=0.0)
    assert plain.tolist() == pytest.approx([2.0, 1.0])


def test_coverage_and_entropy():
    assert coverage([[1, 0, 0], [0, 1, 0]]) == pytest.approx(2 / 3)
    assert coverage(np.empty((0, 3))) == 0.0
    assert solve_rate_entropy([[1, 0], [1, 0]]) == pytest.approx(0.0, abs=1e-9)
    assert solve_rate_entropy([[1, 0], [0, 1]]) == pytest.approx(1.0)
