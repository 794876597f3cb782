"""Competition for items compared with its definition, written out in loops."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.archive import Niches, attraction, coverage, resource_fitness, solve_rate_entropy

tables = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.sampled_from([0.0, 0.25, 1.0]))


@given(tables, st.sampled_from([0.0, 1.0, 2.0]))
def test_fitness_equals_the_papers_sum(scores, alpha):
    for member in range(len(scores)):
        expected = sum(
            scores[member, j] * max(scores[:, j]) / (sum(scores[:, j]) ** alpha or 1.0) for j in range(scores.shape[1])
        )
        assert resource_fitness(scores, alpha)[member] == pytest.approx(expected, abs=1e-9)


@given(tables)
def test_attraction_equals_the_papers_sum(scores):
    gains = attraction(scores, 0)
    assert gains[0] == 0.0
    for member in range(1, len(scores)):
        expected = sum(
            max(scores[:, j]) / (sum(scores[:, j]) or 1.0) * max(scores[member, j] - scores[0, j], 0.0)
            for j in range(scores.shape[1])
        )
        assert gains[member] == pytest.approx(expected, abs=1e-9)


def test_only_solver_of_an_item_earns_more_than_a_crowd():
    fitness = resource_fitness([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert np.argmax(fitness) == 3
    assert fitness.sum() == pytest.approx(3.0)
    plain = resource_fitness([[1, 1, 0], [0, 0, 1]], alpha=0.0)
    assert plain.tolist() == pytest.approx([2.0, 1.0])


def test_coverage_and_entropy_of_known_sets():
    assert coverage([[1, 0, 0], [0, 1, 0]]) == pytest.approx(2 / 3)
    assert coverage([[0.5, 0.4]]) == 0.5
    assert coverage(np.empty((0, 3))) == 0.0
    assert solve_rate_entropy([[1, 0], [1, 0]]) == pytest.approx(0.0, abs=1e-9)
    assert solve_rate_entropy([[1, 0], [0, 1]]) == pytest.approx(1.0)


def filled(rows, **options):
    niches = Niches(len(rows), **options)
    assert [niches.add(row) for row in rows] == list(range(len(rows)))
    return niches


def test_weakest_leaves_and_may_be_the_newcomer():
    niches = filled([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]])
    assert niches.add([0, 0, 0, 0]) is None
    assert niches.add([0, 0, 0, 1]) == 0, "two others share what the first solves; among equals the first slot leaves"
    assert niches.items.tolist() == [[0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert len(niches) == 3


def test_partly_solved_item_hands_out_its_best_score():
    """Capacity: being alone on an item with 0.5 earns 0.5, not 1."""
    assert resource_fitness([[0.5, 0.0], [0.0, 1.0]]).tolist() == pytest.approx([0.5, 1.0])
    niches = filled([[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert niches.add([0.0, 0.0, 0.4]) is None
    assert niches.add([0.0, 0.0, 0.6]) == 0


def test_items_outside_the_unit_interval_are_rescaled():
    assert filled([[-3.0, 0.5], [-1.0, 1.0], [-2.0, 0.0]]).scores().tolist() == [[0, 0.5], [1, 1], [0.5, 0]]
    narrow = filled([[0.50, 0.9], [0.52, 0.8]], from_worst=True)
    np.testing.assert_allclose(narrow.scores(), [[0, 0.1], [0.02, 0]], atol=1e-12)


def test_second_parent_adds_something():
    niches = filled([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    generator = np.random.default_rng(1)
    pairs = {niches.parents(generator) for _ in range(200)}
    assert pairs == {(0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}, "1 has nothing to offer 0"
    assert {niches.parents(generator, attracted=False) for _ in range(400)} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }
    assert (0, 0) in {niches.parents(generator, attracted=False, distinct=False) for _ in range(100)}
    useless = filled([[0, 0], [0, 0], [0, 0]])
    assert len({useless.parents(generator) for _ in range(400)}) == 6
    best = filled([[1, 1], [0.5, 0], [0, 0]])
    assert {best.parents(generator) for _ in range(100)} == {(0, 1), (1, 0)}, (
        "no one has anything to offer 0, so its partner is drawn by share"
    )


def test_first_parent_is_drawn_by_its_share():
    niches = filled([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    generator = np.random.default_rng(2)
    counts = np.bincount([niches.parents(generator)[0] for _ in range(20_000)], minlength=3) / 20_000
    np.testing.assert_allclose(counts, np.array([2.0, 1.0, 1.0]) / 4.0, atol=0.015)


@given(arrays(np.float64, (9, 5), elements=st.sampled_from([0.0, 0.25, 1.0, 1.5])), st.sampled_from([0.0, 1.0, 2.0]))
def test_replacement_follows_the_definition(rows, alpha):
    """Newcomers are added one by one, some with scores above 1."""
    niches, members = Niches(4, alpha), []
    generator = np.random.default_rng(0)
    for row in rows:
        slot = niches.add(row)
        if len(members) < 4:
            members.append(row)
            continue
        table = np.array([*members, row])
        scores = np.where(
            table.max(axis=0) > 1, (table - table.min(axis=0)) / np.maximum(np.ptp(table, axis=0), 1e-300), table
        )
        fitness = resource_fitness(scores, alpha)
        weakest = 4 if slot is None else slot
        assert fitness[weakest] <= fitness.min() + 1e-9
        members = [*table[:4]]
        if slot is not None:
            members[slot] = row
        assert np.array_equal(niches.items, members)
        niches.parents(generator)


@given(
    arrays(np.float64, (14, 6), elements=st.sampled_from([0.0, 0.25, 1.0])),
    arrays(np.bool_, 6),
    arrays(np.bool_, 6),
    st.sampled_from([0.0, 1.0, 2.0]),
)
def test_lost_newcomer_is_turned_away_whatever_its_open_items(rows, solved, is_open, alpha):
    niches = Niches(5, alpha)
    for row in rows:
        niches.add(row)
    failed = ~solved & ~is_open
    credit, cost, _ = niches.stakes()
    best = copy.deepcopy(niches).add(np.where(is_open, 1.0, solved))
    if niches.stakes().lost(failed):
        assert best is None, "it must be turned away even if it solves all open items"
        assert copy.deepcopy(niches).add(solved) is None
    else:
        assert best is not None or (credit - cost[failed].sum(axis=0)).max() < 1e-9, (
            "no newcomer may be given up too early"
        )


def test_nothing_is_lost_if_there_is_room_or_scores_are_rescaled():
    half_full = Niches(3)
    half_full.add([1.0, 1.0])
    rescaled = filled([[-1.0, 0.5], [1.0, 1.0]])
    everything = np.ones(2, np.bool_)
    assert not half_full.stakes().lost(everything)
    assert not rescaled.stakes().lost(everything)
    full = filled([[1.0, 1.0], [1.0, 0.0]])
    assert full.stakes().lost(everything)
    assert full.stakes().order.tolist() == [1, 0], "the item with fewer solvers must come first"
