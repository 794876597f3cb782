"""A quadratic of unit coordinates behind a link: y = link(c + b.x + x.A.x / 2), fitted by weighted ridge regression.

The fit is linear least squares on the link's inverse (weights: the delta method's 1 / variance), regularised, with the
ridge chosen by leave-one-out error in closed form. That stays sound with fewer points than coefficients, where the
published nonlinear fit (Levenberg-Marquardt from an all-ones start) does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Link = Literal["identity", "logit", "softplus"]

_EDGE = 0.005
"""Scores are kept this far from 0 and 1: half an item in a hundred, where a logit still has a finite error."""
_RIDGES = tuple(10.0**power for power in np.arange(-6.0, 3.1, 0.5))


def n_coefficients(dimension: int) -> int:
    """Free coefficients of a quadratic in `dimension` variables: (d + 1)(d + 2) / 2."""
    return (dimension + 1) * (dimension + 2) // 2


def quadratic_features(points: Floats) -> Floats:
    """Features (n, (d + 1)(d + 2) / 2) of unit points (n, d), centred on the cube: 1, z_i, z_i z_j with z = 2x - 1."""
    centred = 2.0 * points - 1.0
    rows, columns = np.triu_indices(points.shape[1])
    return np.hstack([np.ones((len(points), 1)), centred, centred[:, rows] * centred[:, columns]])


@dataclass(frozen=True)
class QuadraticModel:
    """A fitted surrogate of one objective.

    Attributes:
        coefficients: of `quadratic_features`, (n_coefficients,).
        link: from the quadratic's value to the score.
        loo_r2: leave-one-out coefficient of determination on the linked scale; 1 is perfect, below 0 worse than the mean.
    """

    coefficients: Floats
    link: Link
    loo_r2: float

    def predict(self, features: Floats) -> Floats:
        """Scores (n,) at rows of `quadratic_features`."""
        return _FORWARD[self.link](features @ self.coefficients)


def choose_link(scores: Floats) -> Link:
    """`logit` for scores within [0, 1] (accuracies), `softplus` for other scores above 0 (losses), else `identity`."""
    if scores.min() >= 0.0 and scores.max() <= 1.0:
        return "logit"
    return "softplus" if scores.min() > 0.0 else "identity"


def fit_quadratic(points: Floats, scores: Floats, link: Link) -> QuadraticModel:
    """Fits scores (n,) at unit points (n, d), n >= 2."""
    targets, weights = _inverse(scores, link)
    features = quadratic_features(points)
    mean = float(np.average(targets, weights=weights))
    roots = np.sqrt(weights / weights.mean())
    # the constant is free: it is taken out before the ridge shrinks the rest
    design = (features[:, 1:] - np.average(features[:, 1:], axis=0, weights=weights)) * roots[:, None]
    residual = (targets - mean) * roots
    left, singular, right = np.linalg.svd(design, full_matrices=False)
    projected = left.T @ residual
    constant_leverage = roots**2 / np.sum(roots**2)
    best: tuple[float, Floats] | None = None
    for ridge in _RIDGES:
        shrink = singular**2 / (singular**2 + ridge)
        leverage = np.einsum("ij,j,ij->i", left, shrink, left) + constant_leverage
        errors = (residual - left @ (shrink * projected)) / np.maximum(1.0 - leverage, 1e-3)
        error = float(np.sum(errors**2))
        if best is None or error < best[0]:
            best = (error, right.T @ (singular / (singular**2 + ridge) * projected))
    error, slopes = best if best is not None else (0.0, np.zeros(design.shape[1]))
    constant = mean - float(np.average(features[:, 1:], axis=0, weights=weights) @ slopes)
    total = float(np.sum(residual**2))
    return QuadraticModel(np.append(constant, slopes), link, 1.0 - error / total if total > 0.0 else 0.0)


def _inverse(scores: Floats, link: Link) -> tuple[Floats, Floats]:
    """Targets on the linear scale and weights proportional to 1 / variance there."""
    if link == "logit":
        clipped = np.clip(scores, _EDGE, 1.0 - _EDGE)
        return np.log(clipped / (1.0 - clipped)), clipped * (1.0 - clipped)
    if link == "softplus":
        clipped = np.maximum(scores, 1e-9)
        # stable log(exp(y) - 1); its slope is 1 / (1 - exp(-y))
        return clipped + np.log(-np.expm1(-clipped)), np.maximum(-np.expm1(-clipped), 1e-3) ** 2
    return scores, np.ones(len(scores))


_FORWARD: dict[Link, Callable[[Floats], Floats]] = {
    "identity": lambda value: value,
    "logit": lambda value: 1.0 / (1.0 + np.exp(-np.clip(value, -60.0, 60.0))),
    "softplus": lambda value: np.logaddexp(0.0, value),
}
