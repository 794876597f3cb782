"""Dominance, fronts, hypervolume and knees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.archive import Front, hypervolume, knee_index, knees, non_dominated_mask
from evomerge.core import Direction, Evaluation, EvaluationError, Objective, Split, Status

TWO = [Objective("a", Direction.MINIMIZE), Objective("b", Direction.MINIMIZE)]
values = st.integers(0, 6).map(float)
tables = st.integers(1, 3).flatmap(
    lambda m: arrays(np.float64, st.tuples(st.integers(1, 12), st.just(m)), elements=values)
)


def scored(candidate_id: str, *losses: float, status: Status = Status.OK) -> Evaluation:
    scores = dict(zip("abc", losses, strict=False)) if status is Status.OK else {}
    return Evaluation(candidate_id, Split.SEARCH, status, scores=scores)


@given(tables)
def test_mask_matches_the_definition(losses):
    expected = [not any((other <= row).all() and (other < row).any() for other in losses) for row in losses]
    assert non_dominated_mask(losses).tolist() == expected


def test_mask_ignores_rows_with_nan():
    assert non_dominated_mask([[np.nan, 0.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.0]]).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert non_dominated_mask(np.full((2, 2), np.nan)).tolist() == [False, False]


def test_mask_refuses_a_flat_array():
    with pytest.raises(ValueError, match="shape"):
        non_dominated_mask([1.0, 2.0])


@given(tables, st.randoms(use_true_random=False))
def test_front_equals_the_mask_in_any_order(losses, rng):
    objectives = [Objective(name, Direction.MINIMIZE) for name in "abc"[: losses.shape[1]]]
    evaluations = [scored(f"c{i:03d}", *row) for i, row in enumerate(losses)]
    expected = [e.candidate_id for e, kept in zip(evaluations, non_dominated_mask(losses), strict=True) if kept]
    rng.shuffle(evaluations)
    front = Front(objectives)
    for evaluation in evaluations:
        front.add(evaluation)
    assert list(front.ids) == expected
    assert sorted(map(tuple, front.losses)) == sorted(map(tuple, losses[non_dominated_mask(losses)]))
    assert front.losses.shape == (len(expected), len(objectives))


def test_add_returns_whether_the_point_entered_the_front():
    front = Front(TWO)
    assert front.add(scored("c1", 1.0, 1.0))
    assert not front.add(scored("c2", 2.0, 1.0))
    assert front.add(scored("c0", 1.0, 1.0))
    assert front.add(scored("c0", 1.0, 1.0))
    assert front.ids == ("c0", "c1")
    assert front.add(scored("c3", 0.0, 0.0))
    assert len(front) == 1


def test_failed_and_nan_never_enter():
    front = Front(TWO)
    assert not front.add(scored("c1", status=Status.FAILED))
    assert not front.add(scored("c2", status=Status.INFEASIBLE))
    assert not front.add(scored("c3", float("nan"), 1.0))
    assert front.ids == ()
    assert front.losses.shape == (0, 2)
    assert front.hypervolume([1.0, 1.0]) == 0.0


def test_invalid_front_operations_are_errors():
    with pytest.raises(EvaluationError, match="at least one objective"):
        Front([])
    front = Front(TWO)
    front.add(scored("c1", 1.0, 1.0))
    with pytest.raises(EvaluationError, match="c1"):
        front.add(scored("c1", 0.0, 1.0))
    with pytest.raises(EvaluationError, match="no score 'b'"):
        front.add(scored("c2", 0.0))
    with pytest.raises(EvaluationError, match="2 finite losses"):
        front.hypervolume([1.0])
    with pytest.raises(EvaluationError, match="empty"):
        knees(Front(TWO))


def test_maximised_scores_are_flipped():
    front = Front([Objective("a"), Objective("b")])
    front.add(scored("c1", 0.2, 0.9))
    front.add(scored("c2", 0.1, 0.9))
    assert front.ids == ("c1",)
    assert front.hypervolume([0.0, 0.0]) == pytest.approx(0.18)


@settings(max_examples=60)
@given(tables, st.randoms(use_true_random=False))
def test_hypervolume_is_monotone_and_independent_of_order(losses, rng):
    reference = np.full(losses.shape[1], 5.0)
    whole = hypervolume(losses, reference)
    shuffled = losses[rng.sample(range(len(losses)), len(losses))]
    assert hypervolume(shuffled, reference) == pytest.approx(whole)
    assert hypervolume(losses[:-1], reference) <= whole + 1e-9
    assert 0.0 <= whole <= np.prod(reference)


def test_hypervolume_of_known_sets():
    assert hypervolume([[0.0, 0.5], [0.5, 0.0]], [1.0, 1.0]) == pytest.approx(0.75)
    assert hypervolume([[0.5], [0.25]], [1.0]) == pytest.approx(0.75)
    assert hypervolume([[0.0, 0.0, 0.0], [np.nan, 0.0, 0.0]], [1.0, 1.0, 2.0]) == pytest.approx(2.0)
    assert hypervolume([[1.0, 0.0]], [1.0, 1.0]) == 0.0


def test_knee_is_the_bulge():
    assert knee_index([[0.0, 10.0], [0.3, 3.0], [1.0, 0.0]]) == 1
    assert knee_index([[0.0, 1.0], [1.0, 0.0]]) == 0
    assert knee_index([[3.0]]) == 0
    assert knee_index([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.2, 0.2]]) == 3


def test_knee_lies_below_the_plane_through_the_extremes():
    extremes = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.4, 0.0, 1.0]]
    assert knee_index([*extremes, [0.5, 0.2, 0.1], [0.05, 0.42, 0.38]]) == 4, (
        "below the plane through the unit points it would be 3"
    )


def test_knee_of_a_degenerate_front():
    assert knee_index([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]) == 0
    assert knee_index([[0.0, 1.0, 1.0], [10.0, 0.0, 0.0]]) == 1, (
        "point 1 lies on the plane through the unit points, point 0 above it"
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"c4": (0, 3), "c1": (3, 0), "c3": (1, 1), "c2": (2, 0.75)}, {"c3"}),
        ({"c4": (0, 3), "c1": (3, 0), "c3": (1, 1.5), "c2": (1.5, 1)}, {"c2", "c3"}),
        ({"c4": (0, 3), "c1": (3, 0), "c3": (1.5, 2.75)}, {"c1", "c4"}),  # bulges the other way
    ],
)
def test_knees_are_the_bulges_of_a_front(rows, expected):
    front = Front(TWO)
    for candidate_id, row in rows.items():
        front.add(scored(candidate_id, *row))
    assert set(knees(front)) == expected
