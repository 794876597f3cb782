"""Related coordinates: how `cma_es` and the population-based strategies use families."""

import moocore
import numpy as np
import pytest

from evomerge.core import ConfigError, Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy
from evomerge.strategy.rank_weighted_quadratic import RankWeightedQuadratic

GOAL = [Objective("f", Direction.MINIMIZE)]


def families_of(n_families, n_members):
    return tuple(int(number) for number in np.repeat(np.arange(n_families), n_members))


def true_loss(seed, budget, families, spread, **options):
    """True loss of the recommended candidate if each family's optimum is a level plus offsets of `spread`; four pending candidates, noisy scores."""
    generator = np.random.default_rng(seed)
    levels = generator.uniform(0.2, 0.8, max(families) + 1)[list(families)]
    optimum = np.clip(levels + spread * generator.standard_normal(len(families)), 0.0, 1.0)
    strategy = make_strategy(
        "cma_es", dimension=len(families), families=families, objectives=GOAL, seed=seed, start="centre", **options
    )

    def loss(candidate):
        return float(1.0 - np.exp(-12.0 * np.mean((np.array(candidate.point) - optimum) ** 2)))

    pending = []
    for _ in range(budget):
        pending += strategy.ask(4 - len(pending))
        candidate = pending.pop(0)
        score = loss(candidate) + 0.02 * generator.standard_normal()
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, {"f": score}, {"f": 0.02})])
    return loss(strategy.recommend())


def test_levels_with_small_differences_are_found_sooner():
    families = families_of(6, 6)
    known = [true_loss(seed, 80, families, 0.06) for seed in range(5)]
    unknown = [true_loss(seed, 80, families, 0.06, group_correlation=0.0) for seed in range(5)]
    assert np.median(known) < 0.6 * np.median(unknown)


def test_unrelated_members_cost_little():
    families = families_of(3, 8)
    known = [true_loss(seed, 200, families, 0.3) for seed in range(5)]
    unknown = [true_loss(seed, 200, families, 0.3, group_correlation=0.0) for seed in range(5)]
    assert np.median(known) < np.median(unknown) + 0.06


@pytest.mark.parametrize(
    ("families", "options", "expected"),
    [
        ((0, 1, 0, 1, 2, 1), {"group_correlation": 0.8}, 0.8),
        ((0, 1, 0, 1, 2, 1), {"group_correlation": 0.8, "surrogate": "none"}, 0.8),
        ((0, 1) * 9, {}, 0.5),
        ((0, 1) * 16, {}, 1.0 - 8 / 30),
    ],
)
def test_first_steps_of_a_family_are_correlated(families, options, expected):
    strategy = make_strategy(
        "cma_es", dimension=len(families), families=families, objectives=GOAL, seed=1, sigma0=0.05, **options
    )
    found = np.corrcoef([candidate.point for candidate in strategy.ask(4000)], rowvar=False)
    wanted = np.where(np.equal.outer(families, families), expected, 0.0)
    np.fill_diagonal(wanted, 1.0)
    np.testing.assert_allclose(found, wanted, atol=0.08)


@pytest.mark.parametrize(
    ("families", "options"),
    [
        ((0, 1) * 6, {}),
        ((0, 1, 2, 3, 4, 5, 6) * 2, {}),
        (tuple(range(14)), {"group_correlation": 0.8}),
        ((0,) * 14, {"group_correlation": 0.0}),
        ((0,) * 14, {"variant": "sep"}),
    ],
)
def test_proposals_are_unchanged_if_few_coordinates_are_related(families, options):
    arguments = {"dimension": len(families), "objectives": GOAL, "seed": 1, **options}
    assert make_strategy("cma_es", families=families, **arguments).ask(8) == make_strategy("cma_es", **arguments).ask(8)


def test_families_are_checked_and_passed_only_to_strategies_that_use_them():
    with pytest.raises(ConfigError, match=r"one number per coordinate \(3\), got 2"):
        make_strategy("cma_es", dimension=3, families=(0, 0), objectives=GOAL, seed=1)
    assert make_strategy("random", dimension=2, families=(0, 0), objectives=GOAL, seed=1).families is None


def test_results_of_a_search_without_families_can_be_continued():
    def loss(candidate):
        return float(np.sum((np.array(candidate.point) - 0.3) ** 2))

    old = make_strategy("cma_es", dimension=6, objectives=GOAL, seed=1)
    families = (0, 0, 0, 1, 1, 1)
    new = make_strategy("cma_es", dimension=6, families=families, objectives=GOAL, seed=1, group_correlation=0.8)
    for _ in range(12):
        (candidate,) = old.ask(1)
        assert not new.repeat(candidate)
        result = [Evaluation(candidate.id, Split.SEARCH, Status.OK, {"f": loss(candidate)})]
        old.tell(result)
        new.tell(result)
    assert new.recommend() == old.recommend()
    before = loss(new.recommend())
    for _ in range(20):
        (candidate,) = new.ask(1)
        new.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, {"f": loss(candidate)})])
    assert loss(new.recommend()) < 0.5 * before


def test_model_learns_the_levels_first():
    families = np.array(families_of(2, 8))
    model = RankWeightedQuadratic(16, 8, full=False, families=families)
    generator = np.random.default_rng(1)

    def loss(levels):
        return (levels[0] - 0.3) ** 2 + 2.0 * (levels[1] - 0.6) ** 2 + levels[0] * levels[1]

    for _ in range(12):
        point = generator.random(2)[families]
        model.add(point, loss(point[[0, 8]]))
    found = model.minimum(np.full(16, 0.5), np.eye(16), 4.0)
    best = np.linalg.solve([[2.0, 1.0], [1.0, 4.0]], [0.6, 2.4])
    np.testing.assert_allclose(found, best[families], atol=1e-6)


def test_model_with_families_becomes_a_full_quadratic():
    generator = np.random.default_rng(1)
    root = generator.normal(size=(6, 6))
    hessian, optimum = root @ root.T, np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    model = RankWeightedQuadratic(6, 8, families=(0, 0, 1, 1, 1, 2))
    for point in generator.random((60, 6)):
        model.add(point, (point - optimum) @ hessian @ (point - optimum))
    np.testing.assert_allclose(model.minimum(np.full(6, 0.5), np.eye(6), 2.0), optimum, atol=1e-6)


def test_model_adds_individual_coordinates_before_the_full_quadratic():
    families = (0, 0, 0, 1, 1, 1, 2)
    model = RankWeightedQuadratic(7, 8, full=False, families=families)
    generator = np.random.default_rng(1)
    optimum = generator.random(7)
    curvatures = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])

    def loss(point):
        return np.sum(curvatures * (point - optimum) ** 2) + 3.0 * (np.sum((point - optimum)[:3])) ** 2

    for point in generator.random((100, 7)):
        model.add(point, loss(point))
    np.testing.assert_allclose(model.minimum(np.full(7, 0.5), np.eye(7), 3.0), optimum, atol=1e-6)


@pytest.mark.parametrize("name", ["nsga2", "sms_emoa"])
def test_first_population_correlates_families_and_fills_the_cube(name):
    goals, families = [Objective("a"), Objective("b")], (0, 1) * 6
    strategy = make_strategy(name, dimension=12, families=families, objectives=goals, seed=1, population_size=512)
    points = np.array([candidate.point for candidate in strategy.ask(512)])
    found = np.corrcoef(points, rowvar=False)
    together = np.equal.outer(families, families)
    assert (found[together] > 0.8).all()
    assert (np.abs(found[~together]) < 0.1).all()
    for column in points.T:
        np.testing.assert_allclose(np.quantile(column, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.05)
    assert ((points >= 0.0) & (points <= 1.0)).all()


@pytest.mark.parametrize(
    ("families", "options"), [((0,) * 6 + (1,) * 6, {"group_correlation": 0.0}), ((0, 0, 0, 1, 1, 1), {})]
)
def test_first_population_is_unchanged_without_correlation(families, options):
    arguments = {"dimension": len(families), "objectives": ["a", "b"], "seed": 1}
    found = make_strategy("nsga2", families=families, **arguments, **options).ask(20)
    assert found == make_strategy("nsga2", **arguments).ask(20)


def hypervolume_of(seed, **options):
    """The share of [0, 1]^2 dominated by 100 candidates of `nsga2`; two losses with separate optima, each with levels and small differences."""
    families, generator = families_of(3, 8), np.random.default_rng(seed)
    levels = generator.uniform(0.2, 0.8, (2, 3))[:, families]
    optima = np.clip(levels + 0.06 * generator.standard_normal((2, 24)), 0.0, 1.0)
    goals = [Objective(name, Direction.MINIMIZE) for name in "ab"]
    strategy = make_strategy("nsga2", dimension=24, families=families, objectives=goals, seed=seed, **options)
    losses = []
    for _ in range(100):
        (candidate,) = strategy.ask(1)
        losses.append(1.0 - np.exp(-12.0 * np.mean((np.array(candidate.point) - optima) ** 2, axis=1)))
        scores = dict(zip("ab", losses[-1].tolist(), strict=True))
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores)])
    return moocore.hypervolume(np.array(losses), ref=[1.0, 1.0])


def test_front_over_groups_is_found_sooner():
    known = [hypervolume_of(seed) for seed in range(5)]
    unknown = [hypervolume_of(seed, group_correlation=0.0) for seed in range(5)]
    assert np.mean(known) > np.mean(unknown) + 0.08
