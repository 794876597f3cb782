"""The quadratic surrogate finds a quadratic, says how good it is, and its link keeps predictions in range."""

import numpy as np
import pytest

from evomerge.core import ConfigError
from evomerge.strategy import make_strategy
from evomerge.strategy.quadratic_model import choose_link, fit_quadratic, n_coefficients, quadratic_features


def sample(n, dimension, seed=0):
    return np.random.default_rng(seed).random((n, dimension))


def test_counts_and_features():
    assert n_coefficients(3) == 10
    assert quadratic_features(sample(5, 3)).shape == (5, 10)


def test_an_exact_quadratic_is_recovered():
    def truth(x):
        return 1.0 + x @ [1.0, -2.0, 0.5] + 3.0 * x[:, 0] * x[:, 1]

    points = sample(30, 3)
    model = fit_quadratic(points, truth(points), "identity")
    fresh = sample(50, 3, seed=1)
    np.testing.assert_allclose(model.predict(quadratic_features(fresh)), truth(fresh), atol=1e-4)
    assert model.loo_r2 > 0.999


@pytest.mark.parametrize("link", ["logit", "softplus"])
def test_links_keep_the_range_and_fit_their_own_kind(link):
    def truth(x):
        inner = 2.0 * x[:, 0] - 3.0 * (x[:, 1] - 0.4) ** 2
        return 1.0 / (1.0 + np.exp(-inner)) if link == "logit" else np.logaddexp(0.0, inner)

    points = sample(25, 2)
    model = fit_quadratic(points, truth(points), link)
    fresh = sample(50, 2, seed=1)
    np.testing.assert_allclose(model.predict(quadratic_features(fresh)), truth(fresh), atol=1e-3)
    far = model.predict(quadratic_features(50.0 * fresh))
    assert (far >= 0.0).all()
    assert link != "logit" or (far <= 1.0).all()


def test_noise_is_not_mistaken_for_signal():
    points = sample(12, 3)
    noise = np.random.default_rng(5).normal(size=12)
    model = fit_quadratic(points, noise, "identity")
    assert model.loo_r2 < 0.5
    assert np.ptp(model.predict(quadratic_features(points))) < 2.0 * np.ptp(noise)


def test_constant_scores_do_no_harm():
    model = fit_quadratic(sample(4, 2), np.ones(4), "logit")
    assert model.predict(quadratic_features(sample(3, 2))) == pytest.approx(np.full(3, 0.995))


def test_link_follows_the_range():
    assert choose_link(np.array([0.0, 1.0])) == "logit"
    assert choose_link(np.array([0.5, 2.0])) == "softplus"
    assert choose_link(np.array([-0.5, 2.0])) == "identity"


def test_too_many_dimensions_are_refused():
    with pytest.raises(ConfigError, match="at most 40"):
        make_strategy("map", dimension=41, objectives=["a"], seed=1)
