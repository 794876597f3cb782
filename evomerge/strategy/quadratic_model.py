"""A quadratic of unit coordinates with a link function: y = link(c + b.x + x.A.x / 2), fitted by ridge-regularised least squares.

The residuals are those of the scores themselves, as in the published fit. The difference is in the minimisation:
Gauss-Newton steps, each a weighted ridge regression on the linearised link, with the ridge chosen by the closed-form leave-one-out
error, starting from the fit to the inverse-linked scores. This is well-behaved with fewer points than coefficients, unlike the
published fit (Levenberg-Marquardt without a penalty, started from all ones).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evomerge.strategy.base import Floats

Link = Literal["identity", "logit", "softplus"]

_EDGE = 0.005
"""For the start only, scores are clipped this far from 0 and 1 (half an item in a hundred), so that their logits are finite."""
_RIDGES = tuple(10.0**power for power in np.arange(-6.0, 3.1, 0.5))
_STEPS = 8
_HALVINGS = 4
_MIN_SLOPE = 1e-3
_LEAST_REST = 1e-10
"""Lower limit of 1 - leverage, against rounding."""
_CHOOSING_REST = 1e-3
"""The same limit when the ridge is chosen. With fewer points than coefficients a small ridge leaves less, so that its errors look like zero and it
is chosen; with exact errors the search found less (on the digits experts 0.718, 0.743, 0.761, 0.787 of hypervolume instead of 0.732, 0.758, 0.784, 0.805)."""
_MANY = 400
"""Above this number of results, and two per coefficient, the fit uses the products of the columns, in a fraction of the time of a singular value decomposition."""
_FLAT = 1e-12
"""Squared singular values smaller than this, relative to the largest, are rounding errors."""
_REACH = 4.0
"""Limit on the move of the quadratic in one step; a score on a flat part of the link would ask for an unbounded move."""


def n_coefficients(dimension: int, *, diagonal: bool = False) -> int:
    """Number of coefficients of a quadratic in d = `dimension` variables: (d + 1)(d + 2) / 2, or 2 d + 1 without products of two variables."""
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
        link: function from the quadratic's value to the score.
        diagonal: whether it has no products of two coordinates.
        loo_errors: (n,), scores minus their leave-one-out predictions.
        loo_r2: leave-one-out coefficient of determination of the scores; 1 is perfect, below 0 is worse than predicting the mean.
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
    """Fit scores (n,) at unit points (n, d), n >= 2."""
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
    # removing a point changes the linearised fit there by leverage / (1 - leverage) times its residual
    residuals = scores - fitted
    moved = residuals / np.maximum(slopes, _MIN_SLOPE) * fit.leverage / np.maximum(1.0 - fit.leverage, _LEAST_REST)
    errors = scores - forward(linear - moved)[0]
    total = float(np.sum((scores - scores.mean()) ** 2))
    return QuadraticModel(
        fit.coefficients, link, diagonal, errors, 1.0 - float(np.sum(errors**2)) / total if total > 0.0 else 0.0
    )


@dataclass(frozen=True)
class _Ridge:
    """Coefficients (p,), leverage (n,) of each point, and the penalty on squared slopes."""

    coefficients: Floats
    leverage: Floats
    penalty: float


def _ridge_regression(features: Floats, targets: Floats, weights: Floats) -> _Ridge:
    """Weighted ridge regression with an unpenalised constant (the first feature) and the ridge with the smallest leave-one-out error."""
    scale = weights.mean()
    roots = np.sqrt(weights / scale)
    centre = np.average(features[:, 1:], axis=0, weights=weights)
    mean = float(np.average(targets, weights=weights))
    # the constant is removed before the ridge shrinks the rest
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

    With many results they are computed from the p x p products of its columns, which is accurate enough: rounding errors of the squares are
    far below the smallest ridge, and directions in which the points hardly differ are left out.
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
    """Scores on the quadratic's scale (through the inverse link)."""
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
"""link -> function from the quadratic's value to the score and its slope"""
