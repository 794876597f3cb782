"""Archives of elites: which candidates are kept and drawn, what children inherit, and that more kinds of candidates are found than by chance."""

from collections import Counter

import numpy as np
import pytest
from test_strategy_against_random import search

from evomerge.archive import EliteGrid
from evomerge.core import Candidate, ConfigError, Evaluation, Objective, Split, Status, VectorGenome
from evomerge.strategy import make_strategy

SEEDS = {"a": ((0.2, 0.2), (1.0, 0.0)), "b": ((0.8, 0.8), (0.0, 1.0)), "c": ((0.2, 0.8), (0.5, 0.5))}
"""id -> (point, scores of f and g)"""


def make(name, scores=SEEDS, **options):
    """A strategy with seeds in known cells, and without Sobol points."""
    strategy = make_strategy(name, dimension=2, objectives=["f", "g"], seed=3, **{"n_initial": len(scores), **options})
    candidates = [Candidate(key, VectorGenome(point)) for key, (point, _) in scores.items()]
    results = [
        Evaluation(key, Split.SEARCH, Status.OK, scores=dict(zip("fg", values, strict=True)))
        for key, (_, values) in scores.items()
    ]
    strategy.seed(candidates, results)
    return strategy


def tell(strategy, candidate, f, g):
    strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores={"f": f, "g": g})])


def archives(strategy):
    return strategy.diagnostics()["archives"]


def test_each_objective_has_an_archive_with_the_others_as_axes():
    strategy = make("cycleqd", n_bins=2)
    assert archives(strategy) == {}, "the cells must not be known yet"
    (child,) = strategy.ask(1)
    # f spans [0, 1], widened to [0, 1.15]: a and c are both below the middle of g's axis, only b is above
    assert {name: row["elites"] for name, row in archives(strategy).items()} == {"f": 2, "g": 2}
    assert {name: row["best"] for name, row in archives(strategy).items()} == {"f": "a", "g": "b"}
    assert archives(strategy)["f"]["cells"] == 2
    assert archives(strategy)["f"]["qd_score"] == pytest.approx(1.0 + 0.0)
    tell(strategy, child, 0.3, 0.9)
    assert archives(strategy)["f"]["qd_score"] == pytest.approx(1.0 + 0.3), "the child must replace b at a high g"
    assert archives(strategy)["g"]["best"] == "b"


def test_scores_far_from_zero_occupy_separate_cells():
    near = {
        "a": ((0.2, 0.2), (-5000.0, -4990.0)),
        "b": ((0.8, 0.8), (-4990.0, -5000.0)),
        "c": ((0.5, 0.5), (-4995.0, -4995.0)),
    }
    strategy = make("cycleqd", near, n_bins=3)
    strategy.ask(1)
    assert {name: row["elites"] for name, row in archives(strategy).items()} == {"f": 3, "g": 3}


def test_child_without_mutation_lies_on_the_line_through_its_parents():
    strategy = make("cycleqd", mutation_sigma=0.0)
    points = {key: np.array(point) for key, (point, _) in SEEDS.items()}
    shares = []
    for child in strategy.ask(40):
        first, second = (points[parent] for parent in child.parents)
        step = np.array(child.genome.values) - first
        shares.append(step @ (second - first) / np.sum((second - first) ** 2))
        np.testing.assert_allclose(step, shares[-1] * (second - first), atol=1e-12)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.std(shares) == pytest.approx(0.3 / 8**0.5, abs=0.04), (
        "w2 / (w1 + w2) with w ~ N(1, 0.3^2), to first order"
    )


def test_archives_take_turns_in_providing_parents():
    scores = {"p": (0.9, 0.1), "q": (0.6, 0.9), "r": (0.1, 1.0), "s": (0.58, 0.95)}
    strategy = make("cycleqd", {key: ((0.5, 0.5), values) for key, values in scores.items()}, n_bins=2)
    # p and q have the best f at a low and a high g, r and s the best g at a low and a high f
    pairs = [set(child.parents) for child in strategy.ask(6)]
    assert pairs == [{"p", "q"}, {"r", "s"}] * 3


def test_child_of_equally_weighted_parents_is_the_midpoint():
    (child,) = make("cycleqd", crossover_sigma=0.0, mutation_sigma=0.0).ask(1)
    first, second = (np.array(SEEDS[parent][0]) for parent in child.parents)
    np.testing.assert_allclose(child.genome.values, (first + second) / 2)


def test_parent_weights_that_cancel_keep_children_in_bounds():
    for child in make("cycleqd", crossover_sigma=10.0, mutation_sigma=0.0).ask(200):
        assert all(0.0 <= value <= 1.0 for value in child.genome.values)


def test_parents_are_drawn_by_quality_and_axes():
    """In proportion to the product of both, each scaled to [0.5, 0.8] within the archive (elite sampling in the paper)."""
    scores = {key: ((0.5, 0.5), (value, value)) for key, value in {"worst": 0.0, "middle": 0.5, "best": 1.0}.items()}
    n = 4000
    drawn = Counter(child.parents[0] for child in make("cycleqd", scores).ask(n))
    for name, worth in {"worst": 0.5**2, "middle": 0.65**2, "best": 0.8**2}.items():
        assert drawn[name] / n == pytest.approx(worth / (0.5**2 + 0.65**2 + 0.8**2), abs=0.03)


def test_two_distinct_parents_are_drawn_even_if_the_worst_have_zero_weight():
    strategy = make("cycleqd", alpha_low=0.0, alpha_high=1.0)
    assert all(len(set(child.parents)) == 2 for child in strategy.ask(50))


def test_map_elites_keeps_one_archive_of_the_weighted_mean():
    objectives = [Objective("f", weight=3.0), Objective("g", weight=1.0)]
    strategy = make_strategy("map_elites", dimension=2, objectives=objectives, seed=0, n_initial=2, n_bins=10)
    for candidate, (f, g) in zip(strategy.ask(2), [(1.0, 0.0), (0.0, 1.0)], strict=True):
        tell(strategy, candidate, f, g)
    strategy.ask(1)
    report = archives(strategy)["mean"]
    assert (report["elites"], report["cells"], report["best"]) == (2, 100, "c000001")
    assert report["qd_score"] == pytest.approx(0.75 + 0.25)


def test_design_continues_after_failed_or_too_few_results():
    strategy = make_strategy("cycleqd", dimension=3, objectives=["f", "g"], seed=0, n_initial=4)
    sobol = make_strategy("cycleqd", dimension=3, objectives=["f", "g"], seed=0, n_initial=1000)
    for candidate in strategy.ask(8):
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.FAILED, error="no")])
    sobol.ask(8)
    assert [one.genome for one in strategy.ask(3)] == [one.genome for one in sobol.ask(3)]


@pytest.mark.parametrize("later", [(0.7, 0.5), (0.5, 0.2)])
def test_design_continues_while_all_scores_are_equal(later):
    strategy = make("cycleqd", {key: (point, (0.5, 0.5)) for key, (point, _) in SEEDS.items()})
    children = strategy.ask(3)
    assert [child.parents for child in children] == [(), (), ()]
    assert archives(strategy)["f"]["elites"] == 1
    tell(strategy, children[0], *later)
    tell(strategy, children[1], 0.6, 0.6)
    (child,) = strategy.ask(1)
    assert len(child.parents) == 2
    assert max(row["elites"] for row in archives(strategy).values()) >= 2


def test_children_inherit_or_mutate_choices():
    strategy = make_strategy(
        "cycleqd", dimension=2, objectives=["f", "g"], seed=1, n_initial=6, choices=(0, 4), mutation_sigma=0.3
    )
    seen = set()
    for index in range(60):
        (candidate,) = strategy.ask(1)
        value = candidate.genome.values
        if candidate.parents:
            seen.add(value[1])
        tell(strategy, candidate, value[0], 1.0 - value[0] + 0.001 * index)
    assert seen == {0.125, 0.375, 0.625, 0.875}, "the middle of every choice must be reached, and nothing else"


@pytest.mark.parametrize(
    ("name", "objectives", "options", "message"),
    [
        ("cycleqd", ["f"], {}, "cycleqd needs at least two objectives to distinguish candidates by their scores"),
        ("map_elites", ["f"], {}, "map_elites needs at least two objectives"),
        ("cycleqd", ["f", "g"], {"alpha_low": 0.9}, "alpha_low, 0.9, must not exceed alpha_high, 0.8"),
        ("map_elites", ["f", "g"], {"alpha_low": 0.5}, "no option 'alpha_low'"),
    ],
)
def test_invalid_settings_are_refused(name, objectives, options, message):
    with pytest.raises(ConfigError, match=message):
        make_strategy(name, dimension=2, objectives=objectives, seed=0, **options)


def skills(x):
    """Two losses in [0, 1] with different optima, and five coordinates that only do harm."""
    harm = np.sum((x[2:] - 0.35) ** 2)
    return [
        1.0 - np.exp(-3.0 * ((x[0] - 0.2) ** 2 + (x[1] - 0.3) ** 2 + harm)),
        1.0 - np.exp(-3.0 * ((x[0] - 0.8) ** 2 + (x[1] - 0.6) ** 2 + harm)),
    ]


def quality_diversity(losses):
    """The QD score of archives for both losses, each with 15 cells between a loss of 1 and 0."""
    total = 0.0
    for index in (0, 1):
        grid = EliteGrid([-1.0], [0.0], 15)
        for row in -np.array(losses):
            grid.add(row[index], row[[1 - index]])
        total += grid.score(-1.0)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cycleqd", "map_elites"])
def test_more_kinds_of_good_candidates_are_found_than_by_chance(name):
    ours, chance = (
        [quality_diversity(search(which, skills, 7, 2, 150, seed)) for seed in range(5)] for which in (name, "random")
    )
    assert min(ours) > max(chance)
    assert np.mean(ours) > 1.3 * np.mean(chance)
