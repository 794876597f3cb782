"""A quadratic of unit coordinates behind a link: y = link(c + b.x + x.A.x / 2), fitted by ridge-regularised least squares.

The residuals are those of the scores themselves, as in the published fit. What differs is how their sum is minimised:
Gauss-Newton steps, each a weighted ridge regression on the linearised link whose ridge is chosen by leave-one-out error
in closed form, from the fit to the inverse-linked scores. That stays sound with fewer points than coefficients, where
the published one (Levenberg-Marquardt, no penalty, from an all-ones start) does not: there it takes the smallest ridge and meets every point.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evomerge.strategy.base import Floats

Link = Literal["identity", "logit", "softplus"]

_EDGE = 0.005
"""For the start alone, scores are kept this far from 0 and 1: half an item in a hundred, where a logit is still finite."""
_RIDGES = tuple(10.0**power for power in np.arange(-6.0, 3.1, 0.5))
_STEPS = 8
_HALVINGS = 4
_MIN_SLOPE = 1e-3
_LEAST_REST = 1e-10
"""What a leverage leaves of 1 is at least so much: rounding."""
_CHOOSING_REST = 1e-3
"""The same where the ridge is chosen. With fewer points than coefficients a small ridge leaves less, so that it counts as free of errors and is
taken: with exact errors the search found less (on the digits experts .718, .743, .761, .787 of hypervolume for .732, .758, .784, .805)."""
_MANY = 400
"""From so many results on, and two per coefficient, a fit takes a fraction of the time of a singular value decomposition of all."""
_FLAT = 1e-12
"""Squared singular values that are smaller, relative to the largest, are rounding."""
_REACH = 4.0
"""A score on a flat part of the link asks for an endless move of the quadratic: one step asks for no more than this."""


def n_coefficients(dimension: int, *, diagonal: bool = False) -> int:
    """Free coefficients of a quadratic in `dimension` variables: (d + 1)(d + 2) / 2, or 2 d + 1 without products of two of them."""
    return 2 * dimension + 1 if diagonal else (dimension + 1) * (dimension + 2) // 2


def quadratic_features(points: Floats, *, diagonal: bool = False) -> Floats:
    """Features (n, n_coefficients) of unit points (n, d), centred on the cube: 1, z_i, z_i z_j (`diagonal`: z_i^2) with z = 2x - 1."""
    centred = 2.0 * points - 1.0
    if diagonal:
        return np.hstack([np.ones((len(points), 1)), centred, centred**2])
    rows, columns = np.triu_indices(points.shape[1])
    return np.hstack([np.ones((len(points), 1)), centred, centred[:, rows] * centred[:, columns]])


@dataclass(frozen=True)
class QuadraticModel:
    """A fitted surrogate of one objective.

    Attributes:
        coefficients: of `quadratic_features`, (n_coefficients,).
        link: from the quadratic's value to the score.
        diagonal: whether it has no products of two coordinates.
        loo_errors: (n,) scores minus their leave-one-out predictions, in units of the score.
        loo_r2: leave-one-out coefficient of determination of the scores; 1 is perfect, below 0 worse than their mean.
    """

    coefficients: Floats
    link: Link
    diagonal: bool
    loo_errors: Floats
    loo_r2: float

    def predict(self, points: Floats) -> Floats:
        """Scores (k,) at unit points (k, d)."""
        features = quadratic_features(points, diagonal=self.diagonal)
        return _LINKS[self.link](features @ self.coefficients)[0]


def choose_link(scores: Floats) -> Link:
    """`logit` for scores within [0, 1] (accuracies), `softplus` for other scores above 0 (losses), else `identity`."""
    if scores.min() >= 0.0 and scores.max() <= 1.0:
        return "logit"
    return "softplus" if scores.min() > 0.0 else "identity"


def fit_quadratic(points: Floats, scores: Floats, link: Link, *, diagonal: bool = False) -> QuadraticModel:
    """Fits scores (n,) at unit points (n, d), n >= 2."""
    features = quadratic_features(points, diagonal=diagonal)
    forward = _LINKS[link]
    targets = _start(scores, link)
    fit = _ridge_regression(features, targets, np.maximum(forward(targets)[1], _MIN_SLOPE) ** 2)
    for _ in range(0 if link == "identity" else _STEPS):
        linear = features @ fit.coefficients
        fitted, slopes = forward(linear)
        slopes = np.maximum(slopes, _MIN_SLOPE)
        moves = (scores - fitted) / slopes
        targets = linear + np.where(slopes < 0.5, np.clip(moves, -_REACH, _REACH), moves)
        step = _ridge_regression(features, targets, slopes**2)
        before = fit.coefficients
        for halving in range(_HALVINGS + 1):
            coefficients = before + (step.coefficients - before) * 0.5**halving
            if _penalised(features, scores, forward, coefficients, step.penalty) <= _penalised(
                features, scores, forward, before, step.penalty
            ):
                break
        fit = _Ridge(coefficients, step.leverage, step.penalty)
    linear = features @ fit.coefficients
    fitted, slopes = forward(linear)
    # removing a point moves the linearised fit there by leverage / (1 - leverage) times its residual
    residuals = scores - fitted
    moved = residuals / np.maximum(slopes, _MIN_SLOPE) * fit.leverage / np.maximum(1.0 - fit.leverage, _LEAST_REST)
    errors = scores - forward(linear - moved)[0]
    total = float(np.sum((scores - scores.mean()) ** 2))
    return QuadraticModel(
        fit.coefficients, link, diagonal, errors, 1.0 - float(np.sum(errors**2)) / total if total > 0.0 else 0.0
    )


@dataclass(frozen=True)
class _Ridge:
    """Coefficients (p,), leverage (n,) of each point on its own fit, and the penalty on squared slopes."""

    coefficients: Floats
    leverage: Floats
    penalty: float


def _ridge_regression(features: Floats, targets: Floats, weights: Floats) -> _Ridge:
    """Weighted ridge regression with a free constant (the first feature) and the ridge of least leave-one-out error."""
    scale = weights.mean()
    roots = np.sqrt(weights / scale)
    centre = np.average(features[:, 1:], axis=0, weights=weights)
    mean = float(np.average(targets, weights=weights))
    # the constant is taken out before the ridge shrinks the rest
    design = (features[:, 1:] - centre) * roots[:, None]
    residual = (targets - mean) * roots
    left, singular, right = _factors(design)
    projected = left.T @ residual
    shrinks = singular**2 / (singular**2 + np.array(_RIDGES)[:, None])
    leverages = shrinks @ (left**2).T + roots**2 / np.sum(roots**2)
    errors = (residual - (shrinks * projected) @ left.T) / np.maximum(1.0 - leverages, _CHOOSING_REST)
    best = int(np.argmin(np.sum(errors**2, axis=1)))
    slopes = right.T @ (singular / (singular**2 + _RIDGES[best]) * projected)
    return _Ridge(np.append(mean - centre @ slopes, slopes), leverages[best], _RIDGES[best] * scale)


def _factors(design: Floats) -> tuple[Floats, Floats, Floats]:
    """Singular vectors and values of a design (n, p): left (n, k), singular (k,), right (k, p).

    With many results they come from the p x p products of its columns, which are exact enough: what the squares lose to rounding is far
    below the smallest ridge, and directions in which the points hardly differ are left out.
    """
    if len(design) <= max(_MANY, 2 * design.shape[1]):
        left, singular, right = np.linalg.svd(design, full_matrices=False)
        return left, singular, right
    squares, vectors = np.linalg.eigh(design.T @ design)
    known = squares > _FLAT * squares[-1]
    singular, right = np.sqrt(squares[known]), vectors[:, known].T
    return design @ right.T / singular, singular, right


def _penalised(features: Floats, scores: Floats, forward: "_Forward", coefficients: Floats, penalty: float) -> float:
    residuals = scores - forward(features @ coefficients)[0]
    return float(residuals @ residuals + penalty * coefficients[1:] @ coefficients[1:])


def _start(scores: Floats, link: Link) -> Floats:
    """Scores on the quadratic's scale."""
    if link == "logit":
        clipped = np.clip(scores, _EDGE, 1.0 - _EDGE)
        return np.asarray(np.log(clipped / (1.0 - clipped)))
    if link == "softplus":
        clipped = np.maximum(scores, 1e-9)
        return np.asarray(clipped + np.log(-np.expm1(-clipped)))  # a stable log(exp(y) - 1)
    return scores


def _sigmoid(value: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(value, -60.0, 60.0))))


def _logit_forward(value: Floats) -> tuple[Floats, Floats]:
    score = _sigmoid(value)
    return score, score * (1.0 - score)


_Forward = Callable[[Floats], tuple[Floats, Floats]]
_LINKS: dict[Link, _Forward] = {
    "identity": lambda value: (value, np.ones_like(value)),
    "logit": _logit_forward,
    "softplus": lambda value: (np.logaddexp(0.0, value), _sigmoid(value)),
}
"""From the quadratic's value to the score, and the score's slope."""
