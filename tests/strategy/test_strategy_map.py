"""The quadratic surrogate recovers a quadratic and reports its quality; Bayesian MAP samples where it errs; nested MAP builds a tree."""

import numpy as np
import pytest
from test_strategy_against_random import search, zdt1

from evomerge.archive import hypervolume
from evomerge.core import ConfigError, Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy
from evomerge.strategy.map_bins import bin_numbers, bin_scores, bins_per_angle, directions, draw_where_wrong
from evomerge.strategy.map_front import Surrogates
from evomerge.strategy.quadratic_model import choose_link, fit_quadratic, n_coefficients, quadratic_features
from evomerge.strategy.ruin import tamed


def sample(n, dimension, seed=0):
    return np.random.default_rng(seed).random((n, dimension))


def test_number_of_coefficients_and_features():
    assert n_coefficients(3) == 10
    assert quadratic_features(sample(5, 3)).shape == (5, 10)
    assert n_coefficients(3, diagonal=True) == 7
    assert quadratic_features(sample(5, 3), diagonal=True).shape == (5, 7)


def test_exact_quadratic_is_recovered():
    def truth(x):
        return 1.0 + x @ [1.0, -2.0, 0.5] + 3.0 * x[:, 0] * x[:, 1]

    points = sample(30, 3)
    model = fit_quadratic(points, truth(points), "identity")
    fresh = sample(50, 3, seed=1)
    np.testing.assert_allclose(model.predict(fresh), truth(fresh), atol=1e-4)
    assert model.loo_r2 > 0.999


@pytest.mark.parametrize("link", ["logit", "softplus"])
def test_links_keep_the_range_and_fit_matching_functions(link):
    def truth(x):
        inner = 2.0 * x[:, 0] - 3.0 * (x[:, 1] - 0.4) ** 2
        return 1.0 / (1.0 + np.exp(-inner)) if link == "logit" else np.logaddexp(0.0, inner)

    points = sample(25, 2)
    model = fit_quadratic(points, truth(points), link)
    fresh = sample(50, 2, seed=1)
    np.testing.assert_allclose(model.predict(fresh), truth(fresh), atol=1e-3)
    far = model.predict(50.0 * fresh)
    assert (far >= 0.0).all()
    assert link != "logit" or (far <= 1.0).all()


def test_noise_is_not_mistaken_for_signal():
    points = sample(12, 3)
    noise = np.random.default_rng(5).normal(size=12)
    model = fit_quadratic(points, noise, "identity")
    assert model.loo_r2 < 0.5
    assert np.ptp(model.predict(points)) < 2.0 * np.ptp(noise)


def test_constant_scores_can_be_fitted():
    model = fit_quadratic(sample(4, 2), np.ones(4), "logit")
    assert model.predict(sample(3, 2)) == pytest.approx(np.full(3, 1.0), abs=0.006)


def test_losses_above_zero_alternate_between_softplus_and_identity():
    points = np.random.default_rng(0).random((9, 2))
    losses = np.column_stack([1.0 + points.sum(axis=1), points[:, 0]])
    goals = (Objective("a", Direction.MINIMIZE), Objective("b", Direction.MINIMIZE))

    def links(n, link):
        return [model.link for model in Surrogates.fitted(points[:n], losses[:n], goals, link).models]

    assert links(8, "auto") == ["softplus", "logit"]
    assert links(9, "auto") == ["identity", "logit"]
    assert links(9, "softplus") == ["softplus", "softplus"]


def test_link_follows_the_range():
    assert choose_link(np.array([0.0, 1.0])) == "logit"
    assert choose_link(np.array([0.5, 2.0])) == "softplus"
    assert choose_link(np.array([-0.5, 2.0])) == "identity"


def test_leave_one_out_errors_equal_refitting_without_the_point():
    points = sample(60, 2)
    truth = 1.0 / (1.0 + np.exp(3.0 * points[:, 0] - 2.0 * points[:, 1]))
    scores = np.clip(truth + np.random.default_rng(2).normal(0.0, 0.02, 60), 0.0, 1.0)
    errors = fit_quadratic(points, scores, "logit").loo_errors
    for row in range(8):
        rest = np.arange(60) != row
        refitted = fit_quadratic(points[rest], scores[rest], "logit").predict(points[[row]])
        assert errors[row] == pytest.approx(scores[row] - refitted[0], abs=0.006)


def test_bins_cover_the_directions():
    points = sample(2000, 3)
    assert directions(points).min() >= 0.0
    assert directions(points).max() <= np.pi / 2.0
    assert set(bin_numbers(points)) == set(range(bins_per_angle(3) ** 2))
    assert bin_numbers(points).tolist() == bin_numbers(0.3 * points).tolist()


def test_unvisited_bins_score_as_high_as_the_worst_known_bin():
    points = sample(6, 3)
    errors = np.linspace(0.1, 0.6, 6)
    waiting = np.array([[0.01, 0.02, 1.0]])
    scores = bin_scores(points, errors, waiting, np.random.default_rng(0))
    known = np.unique(bin_numbers(points))
    unknown = np.setdiff1d(np.arange(16), [*known, *bin_numbers(waiting)])
    assert (scores[unknown] == scores[known].max()).all()
    assert scores[bin_numbers(waiting)[0]] == pytest.approx(scores[known].mean())


def test_new_points_fall_where_the_errors_are():
    points = sample(400, 2)
    wrong = bin_numbers(points) == 2
    drawn = np.array(
        [draw_where_wrong(points, 1.0 * wrong, points[:0], np.random.default_rng(seed)) for seed in range(100)]
    )
    assert np.mean(bin_numbers(drawn) == 2) > 0.95
    assert (drawn >= 0.0).all()
    assert (drawn <= 1.0).all()


def told(strategy, scores_of, n):
    for _ in range(n):
        (candidate,) = strategy.ask(1)
        strategy.tell(
            [Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores_of(np.array(candidate.genome.values)))]
        )
    return strategy


def test_diagnostics_report_the_quality_of_the_surrogates():
    def scores_of(x):
        return {"smooth": float(np.mean(x)), "rough": float(np.sin(1e4 * x.sum()))}

    strategy = make_strategy("map", dimension=2, objectives=["smooth", "rough"], seed=1)
    assert strategy.diagnostics() == {}
    quality = told(strategy, scores_of, 20).diagnostics()["loo_r2"]
    assert quality["smooth"] > 0.9
    assert quality["rough"] < 0.5


def test_nested_tree_beats_random_search_over_twelve_conflicting_sources():
    def scores_of(x):
        return {f"t{k}": float(1.0 / (1.0 + np.exp(1.0 - 7.2 * x[k] + 1.2 * x.sum()))) for k in range(12)}

    def best_mean(name, **options):
        strategy = make_strategy(name, dimension=12, objectives=[f"t{k}" for k in range(12)], seed=1, **options)
        means = []
        for _ in range(110):
            (candidate,) = strategy.ask(1)
            scores = scores_of(np.array(candidate.genome.values))
            means.append(np.mean(list(scores.values())))
            strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)])
        return strategy, max(means)

    nested, mean = best_mean("map", nested=True, pair_points=8)
    assert len(nested.diagnostics()["pairs"]) == 11
    assert mean > 1.3 * best_mean("random")[1]


def test_diagonal_model_finds_a_front_in_many_dimensions():
    ours = hypervolume(search("map", zdt1, 20, 2, 100, 0), [1.1, 1.1])
    assert ours > 0.5
    assert hypervolume(search("map", zdt1, 20, 2, 100, 0, model="quadratic"), [1.1, 1.1]) < 0.5 * ours


def test_variants_refuse_unsuitable_spaces():
    with pytest.raises(ConfigError, match=r"903 coefficients.*at most 861.*diagonal"):
        make_strategy("map", dimension=41, objectives=["a"], seed=1, model="quadratic")
    make_strategy("map", dimension=41, objectives=["a"], seed=1)
    with pytest.raises(ConfigError, match="at most 861"):
        make_strategy("map", dimension=431, objectives=["a"], seed=1)
    with pytest.raises(ConfigError, match="bayesian takes 2 to 6 dimensions"):
        make_strategy("map", dimension=7, objectives=["a"], seed=1, bayesian=True)
    with pytest.raises(ConfigError, match="only one dimension"):
        make_strategy("map", dimension=1, objectives=["a"], seed=1, nested=True)
    with pytest.raises(ConfigError, match="nested needs a space of one weight per source"):
        make_strategy("map", dimension=2, objectives=["a"], seed=1, choices=(0, 2), nested=True)
    make_strategy("map", dimension=100, objectives=["a"], seed=1, nested=True)


@pytest.mark.parametrize("n_objectives", [1, 2])
@pytest.mark.parametrize("bayesian", [False, True])
def test_front_of_one_point_is_evaluated_once(n_objectives, bayesian):
    """If all objectives have their optimum in the same corner, the surrogates' front is that corner; it used to be proposed again and again."""
    objectives = [Objective(f"f{i}", Direction.MINIMIZE) for i in range(n_objectives)]
    strategy = make_strategy("map", dimension=3, objectives=objectives, seed=0, bayesian=bayesian)
    seen = set()
    for _ in range(40):
        (candidate,) = strategy.ask(1)
        assert candidate.genome not in seen
        seen.add(candidate.genome)
        loss = float(np.sum((np.array(candidate.point) - 1.2) ** 2))
        scores = {goal.name: loss * (i + 1) for i, goal in enumerate(objectives)}
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)])
    assert strategy.recommend().point == (1.0,) * 3


def test_leave_one_out_is_poor_if_the_fit_interpolates_its_points():
    """With fewer points than coefficients, every point is fitted exactly but none is predicted."""
    points = sample(12, 4)
    scores = np.sin(12.0 * points[:, 0]) * np.cos(9.0 * points[:, 1])
    model = fit_quadratic(points, scores, "identity")
    np.testing.assert_allclose(model.predict(points), scores, atol=1e-3)
    assert model.loo_r2 < 0.5
    for row in range(12):
        rest = np.arange(12) != row
        refitted = fit_quadratic(points[rest], scores[rest], "identity").predict(points[[row]])
        assert model.loo_errors[row] == pytest.approx(scores[row] - refitted[0], rel=1e-3)


def test_taming_keeps_losses_distinct_if_most_equal_the_best():
    losses = np.array([[22.0, 9.0], [22.0, 5.0], [22.0, 6.0], [24.0, 7.0], [30.0, 900.0]])
    kept = tamed(losses, 5)
    np.testing.assert_array_equal(kept[:, 0], losses[:, 0])
    np.testing.assert_array_equal(kept[:, 1], [9.0, 5.0, 6.0, 7.0, 17.0])


def test_ruined_models_do_not_spoil_the_surrogates():
    """Perplexity explodes for large weights, in a fifth of the cube; the front of the rest must still be found."""

    def ruined(factor):
        def losses(x):
            ruin = factor * (1.0 + x[0]) * (x.sum() > 1.9)
            return [5.0 + 3.0 * np.sum((x - 0.2) ** 2) + ruin, 7.0 + 4.0 * np.sum((x - [0.6, 0.3, 0.1]) ** 2) + ruin]

        return losses

    def volume(factor):
        return np.mean([hypervolume(search("map", ruined(factor), 3, 2, 60, seed), [5.6, 7.8]) for seed in range(4)])

    assert volume(1e6) > 0.8 * volume(0.0)


@pytest.mark.parametrize("link", ["identity", "logit"])
def test_fit_to_many_results_equals_a_full_decomposition(link, monkeypatch):
    """Even if one coordinate is constant and two are always equal."""
    generator = np.random.default_rng(0)
    points = generator.random((600, 6))
    points[:, 4], points[:, 5] = 0.5, points[:, 3]
    scores = np.clip(1.0 - 2.0 * ((points - 0.3) ** 2).mean(axis=1) + 0.03 * generator.standard_normal(600), 0.0, 1.0)
    fast = fit_quadratic(points, scores, link, diagonal=True)
    monkeypatch.setattr("evomerge.strategy.quadratic_model._MANY", 1000)
    exact = fit_quadratic(points, scores, link, diagonal=True)
    assert np.abs(fast.coefficients - exact.coefficients).max() < 1e-8
    assert np.abs(fast.loo_errors - exact.loo_errors).max() < 1e-8
    assert fast.loo_r2 == pytest.approx(exact.loo_r2, abs=1e-8)
