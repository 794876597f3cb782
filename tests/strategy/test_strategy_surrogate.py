"""The quadratic model of `cma_es`, and how many evaluations it saves."""

import numpy as np
import pytest
from scipy.linalg import lstsq

from evomerge.core import Candidate, ConfigError, Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy
from evomerge.strategy.rank_weighted_quadratic import RankWeightedQuadratic, trust_region_step


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_full_quadratic_is_recovered(scale):
    generator = np.random.default_rng(1)
    root = generator.normal(size=(4, 4))
    hessian, optimum = root @ root.T, np.full(4, 0.4)

    def loss(x):
        return 3.0 + (x - optimum) @ hessian @ (x - optimum)

    model = RankWeightedQuadratic(4, 8)
    for point in optimum + scale * generator.uniform(-0.3, 0.3, (30, 4)):
        model.add(point, loss(point))
    assert model.agreement(1) > 0.99
    found = model.minimum(optimum + 0.1 * scale, scale * np.eye(4), 1.0)
    np.testing.assert_allclose((found - optimum) / scale, 0.0, atol=2e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spread", [0.0, 1e-200])
def test_converged_coordinate_has_no_influence(spread):
    """Not even for points elsewhere, such as a late result of an earlier proposal."""
    model = RankWeightedQuadratic(2, 8)
    for number in range(12):
        model.add(np.array([spread * number, 0.1 * number]), (0.1 * number - 0.4) ** 2)
    np.testing.assert_allclose(np.diff(model.predict(np.array([[0.0, 0.4], [0.3, 0.4], [0.3, 0.5]]))), [0.0, 0.01])
    np.testing.assert_allclose(model.minimum(np.array([0.3, 0.5]), 0.1 * np.eye(2), 2.0), [0.3, 0.4])


def test_trust_region_step_is_no_worse_than_many_points_of_the_ball():
    generator = np.random.default_rng(2)
    for hessian in (np.diag([1.0, 4.0, 9.0]), np.diag([-1.0, 2.0, 0.5]), np.zeros((3, 3))):
        slope = np.array([1.0, -2.0, 0.5])
        step = trust_region_step(slope, hessian, 0.7)
        assert np.linalg.norm(step) <= 0.7 * (1 + 1e-9)
        points = generator.normal(size=(4000, 3))
        points *= 0.7 * (generator.random((4000, 1)) ** (1 / 3)) / np.linalg.norm(points, axis=1, keepdims=True)
        values = points @ slope + 0.5 * np.einsum("ij,jk,ik->i", points, hessian, points)
        assert step @ slope + 0.5 * step @ hessian @ step <= values.min() + 1e-9


def search(seed, noise=0.0, workers=4, budget=120, dimension=4, **options):
    """True loss of the recommended candidate on an ellipsoid that the strategy sees with `noise`."""
    strategy = make_strategy(
        "cma_es", dimension=dimension, objectives=[Objective("f", Direction.MINIMIZE)], seed=seed, **options
    )
    generator = np.random.default_rng(seed)
    pending = []

    def loss(candidate):
        return float(np.sum(10.0 ** np.linspace(0, 3, dimension) * (np.array(candidate.genome.values) - 0.3) ** 2))

    for _ in range(budget):
        pending += strategy.ask(workers - len(pending))
        candidate = pending.pop(0)
        score = loss(candidate) + noise * generator.standard_normal()
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, {"f": score}, {"f": noise})])
    return loss(strategy.recommend())


def test_model_saves_evaluations_with_four_pending():
    modelled = [search(seed) for seed in range(5)]
    plain = [search(seed, surrogate="none") for seed in range(5)]
    assert np.median(modelled) < 1e-2 * np.median(plain)


def test_diagonal_model_saves_evaluations_in_many_dimensions():
    modelled = [search(seed, dimension=30, budget=300) for seed in range(3)]
    plain = [search(seed, dimension=30, budget=300, surrogate="none") for seed in range(3)]
    assert np.median(modelled) < 1e-2 * np.median(plain)


def test_diagonal_model_helps_under_noise_too():
    modelled = [search(seed, noise=20.0, dimension=40, budget=300) for seed in range(3)]
    plain = [search(seed, noise=20.0, dimension=40, budget=300, surrogate="none") for seed in range(3)]
    assert np.median(modelled) < np.median(plain)


def test_diagonal_model_stays_small_and_waits_for_more_results_than_coefficients():
    generator = np.random.default_rng(1)
    model = RankWeightedQuadratic(3, 8, full=False)
    assert model.min_results * 0.75 >= 4
    for point in generator.random((200, 3)):
        model.add(point, float(np.sum((point - 0.4) ** 2) + 3.0 * point[0] * point[1]))
    assert len(model._fitted()[0]) == 7
    assert len(model) == 35


def test_noise_does_not_make_the_model_worse_than_none():
    modelled = [search(seed, noise=0.5) for seed in range(9)]
    plain = [search(seed, noise=0.5, surrogate="none") for seed in range(9)]
    assert np.median(modelled) <= 1.5 * np.median(plain)


def test_search_works_with_more_workers_than_samples():
    assert search(1, workers=40) < 10.0


def test_model_alone_does_not_advance_a_large_population():
    """On an exact quadratic every result would end a generation of two hundred samples, which is slow."""
    goal = [Objective("f", Direction.MINIMIZE)]
    strategy = make_strategy("cma_es", dimension=4, objectives=goal, seed=1, population_size=200, restarts="none")
    for _ in range(100):
        (candidate,) = strategy.ask(1)
        loss = float(np.sum((np.array(candidate.point) - 0.3) ** 2))
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, {"f": loss})])
    assert 5 < strategy._run._es.countiter <= 21


def test_surrogate_needs_the_full_variant():
    with pytest.raises(ConfigError, match="variant full"):
        make_strategy("cma_es", dimension=4, objectives=["a"], seed=1, surrogate="quadratic", variant="sep")
    with pytest.raises(ConfigError, match="surrogate diagonal needs variant full"):
        make_strategy("cma_es", dimension=4, objectives=["a"], seed=1, surrogate="diagonal", variant="vkd")


def test_optimum_in_a_corner_ends_the_run_before_the_step_size_overflows():
    slope = 10.0 ** (np.arange(10) / 9.0) * np.where(np.arange(10) % 3, 1.0, -1.0)
    goal = [Objective("f", Direction.MINIMIZE)]
    strategy = make_strategy("cma_es", dimension=10, objectives=goal, seed=502, restarts="none")
    losses = []
    while len(losses) < 500 and not strategy.stop_reasons():
        (candidate,) = strategy.ask(1)
        losses.append(float(slope @ np.array(candidate.genome.values)))
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, {"f": losses[-1]})])
    assert "sigma" in strategy.stop_reasons()
    assert min(losses) == pytest.approx(slope[slope < 0.0].sum(), rel=1e-3)


@pytest.mark.parametrize("surrogate", ["quadratic", "none"])
def test_item_noise_keeps_the_step_size_up_if_noise_dominates(surrogate):
    def last_sigma(stderr, **options):
        goal = [Objective("f", Direction.MINIMIZE)]
        strategy = make_strategy("cma_es", dimension=4, objectives=goal, seed=1, surrogate=surrogate, **options)
        noise = np.random.default_rng(1)
        for _ in range(150):
            (candidate,) = strategy.ask(1)
            score = float(np.sum((np.array(candidate.genome.values) - 0.3) ** 2)) + stderr * noise.standard_normal()
            strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, {"f": score}, {"f": stderr})])
        return strategy._run._es.sigma

    assert last_sigma(0.1, item_noise=True) > 1.5 * last_sigma(0.1)
    assert last_sigma(0.0, item_noise=True) == last_sigma(0.0)


def events(strategy, pending, n_tells, workers, target, fails):
    """The proposals and results in order; candidates whose numbers `fails` names have no score."""
    history = []
    for _ in range(n_tells):
        asked = list(strategy.ask(workers - len(pending)))
        pending += asked
        candidate = pending.pop(len(pending) // 2)
        value = -float(np.sum((np.array(candidate.point) - target) ** 2))
        status = Status.FAILED if fails(int(candidate.id[1:])) else Status.OK
        told = Evaluation(candidate.id, Split.SEARCH, status, {"f": value} if status is Status.OK else {})
        strategy.tell([told])
        history += [*asked, told]
    return history


@pytest.mark.parametrize(
    ("target", "workers", "options"),
    [
        (0.3, 4, {}),
        (0.3, 12, {}),
        (1.3, 4, {}),
        (0.3, 4, {"choices": (3, 0, 0, 4)}),
        (0.3, 6, {"choices": (5, 5, 5, 7)}),
        (0.3, 4, {"families": (0, 0, 1, 1), "group_correlation": 0.5}),
        (0.3, 1, {"restarts": "bipop", "population_size": 4}),
    ],
)
def test_replay_is_exact_and_fits_few_models(target, workers, options, monkeypatch):
    """Even if points repeat, with an optimum in a corner or in a space of choices, and after restarts."""

    def fresh():
        return make_strategy("cma_es", dimension=4, objectives=[Objective("f")], seed=3, **options)

    def go_on(strategy, pending, n_tells):
        return events(strategy, pending, n_tells, workers, target, lambda number: number % 11 == 0)

    fits = []
    monkeypatch.setattr(
        "evomerge.strategy.rank_weighted_quadratic.lstsq",
        lambda *args, **kwargs: fits.append(1) or lstsq(*args, **kwargs),
    )
    strategy, pending = fresh(), []
    history = go_on(strategy, pending, 400)
    state, waiting, n_fits = strategy.state_dict(), list(pending), len(fits)
    fits.clear()
    repeated, loaded = fresh(), fresh()
    for event in history:
        if isinstance(event, Candidate):
            assert repeated.repeat(event)
        else:
            repeated.tell([event])
    assert target > 1.0 or all(options.get("choices", (0,))) or len(fits) < n_fits
    loaded.load_state_dict(state)
    expected = go_on(strategy, pending, 100)
    assert go_on(repeated, list(waiting), 100) == expected
    assert go_on(loaded, list(waiting), 100) == expected


@pytest.mark.parametrize(
    ("seed", "target", "workers", "options"),
    [
        (7, 1.2, 4, {"dimension": 5, "restarts": "bipop"}),
        (11, 1.2, 4, {"dimension": 1, "restarts": "none"}),
        (21, 1.3, 2, {"dimension": 2, "restarts": "ipop"}),
        (45, 1.2, 4, {"dimension": 5, "restarts": "bipop"}),
    ],
)
def test_replay_is_exact_if_the_minimum_of_the_model_repeats(seed, target, workers, options):
    """The minimum is the first sample of every generation; at a bound it is always the same point, already known and therefore not proposed."""

    def fresh():
        return make_strategy("cma_es", objectives=[Objective("f")], seed=seed, **options)

    def go_on(strategy, pending, n_tells):
        return events(
            strategy, pending, n_tells, workers, target, lambda number: np.random.default_rng(number).random() < 0.4
        )

    strategy, pending = fresh(), []
    go_on(strategy, pending, 70)
    loaded, waiting = fresh(), list(pending)
    loaded.load_state_dict(strategy.state_dict())
    assert go_on(loaded, waiting, 25) == go_on(strategy, pending, 25)
