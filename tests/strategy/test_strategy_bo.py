"""The Gaussian process: gradient, interpolation, calibration of draws; and that `bo` learns fast."""

import numpy as np
import pytest
from evomerge.strategy.gaussian_process import GaussianProcess
from scipy.optimize import approx_fprime
from test_strategy_against_random import search, sphere, zdt1

from evomerge.archive import hypervolume
from evomerge.core import Evaluation, Split, Status
from evomerge.strategy import make_strategy


def data(n=20, dimension=3):
    points = np.random.default_rng(0).random((n, dimension))
    return points, np.sin(3.0 * points[:, 0]) + points[:, 1] ** 2


def test_gradient_of_the_hyperparameter_objective():
    process = GaussianProcess(*data(), np.zeros(20))
    for values in ([0.1, 0.2, -0.3, 0.1, -3.0], [1.0, -1.0, 2.0, -0.5, -8.0]):
        expected = approx_fprime(np.array(values), lambda v: process._objective(v)[0], 1e-6)
        np.testing.assert_allclose(process._objective(np.array(values))[1], expected, rtol=1e-3, atol=1e-2)


def test_it_interpolates_and_knows_what_it_does_not_know():
    points, values = data()
    process = GaussianProcess(points, values, np.zeros(20))
    mean, deviation = process.posterior(points)
    np.testing.assert_allclose(mean, values, atol=0.05)
    assert process.posterior(np.full((1, 3), 3.0))[1] > 3.0 * deviation.max()


def test_known_noise_widens_the_posterior():
    points, values = data()
    exact = GaussianProcess(points, values, np.zeros(20))
    noisy = GaussianProcess(points, values, np.full(20, 0.1), exact.hyperparameters, fit=False)
    assert (noisy.posterior(points)[1] > exact.posterior(points)[1]).all()


def test_draws_have_the_posteriors_mean_and_spread():
    process = GaussianProcess(*data(8), np.zeros(8))
    points = np.random.default_rng(1).random((4, 3))
    draws = process.sample(points, np.random.default_rng(2).standard_normal((4000, 4)))
    mean, deviation = process.posterior(points)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=4.0 * deviation.max() / np.sqrt(4000) + 1e-6)
    np.testing.assert_allclose(draws.std(axis=0), deviation, rtol=0.1, atol=1e-6)


def test_one_objective_beats_random_at_a_tenth_of_the_budget():
    assert search("bo", sphere, 4, 1, 30, 0).min() < search("random", sphere, 4, 1, 300, 0).min()


def test_two_objectives_beat_nsga2():
    ours = hypervolume(search("bo", zdt1, 5, 2, 40, 0, n_draws=4), [1.1, 1.1])
    assert ours > hypervolume(search("nsga2", zdt1, 5, 2, 120, 0), [1.1, 1.1])


def test_old_results_are_dropped_beyond_max_points():
    strategy = make_strategy("bo", dimension=2, objectives=["a"], seed=1, max_points=20)
    for _ in range(30):
        (candidate,) = strategy.ask(1)
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores={"a": -sum(candidate.genome.values)})])
    points, losses, _ = strategy._visible()
    assert points.shape == (20, 2)
    assert losses.min() == pytest.approx(min(told.losses[0] for told in strategy._finished))
