"""Exact Gaussian-process regression on the unit cube: Matern 5/2 with one length scale per coordinate.

Hyperparameters maximise the posterior under the priors that make defaults work in many dimensions (Hvarfner et al.,
arXiv 2402.02229): log length scale ~ N(sqrt 2 + log(d) / 2, 3), log signal variance ~ N(0, 1); the log noise variance has a wider prior of ours.
NumPy and SciPy alone; cubic in the number of points, so meant for hundreds of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

Floats = NDArray[np.float64]

_JITTER = 1e-8
_LOG_NOISE = (-8.0, 2.0)
"""Mean and deviation of the log noise variance: wide, as evaluations range from exact to a hundred items."""
_ROOT5 = np.sqrt(5.0)


@dataclass(frozen=True)
class Hyperparameters:
    """Logarithms of length scales (d,), signal variance and noise variance; outputs are standardised."""

    values: Floats

    @classmethod
    def prior_mean(cls, dimension: int) -> "Hyperparameters":
        """The mode to start from."""
        length = 0.5 * np.log(dimension)
        return cls(np.append(np.full(dimension, min(length - 1.0, 1.0)), [0.0, _LOG_NOISE[0]]))


class GaussianProcess:
    """A posterior over functions given `points` (n, d) and `values` (n,).

    Args:
        points: unit points.
        values: what was observed there; standardised inside.
        known_variance: (n,) variances of the observations that are known (item noise), in units of `values` squared.
        start: where the hyperparameter search starts; None: the prior's mode.
        fit: False keeps `start` as it is.
    """

    def __init__(
        self,
        points: Floats,
        values: Floats,
        known_variance: Floats,
        start: Hyperparameters | None = None,
        fit: bool = True,
    ) -> None:
        self._points = points
        self._shift = float(values.mean())
        self._scale = float(values.std()) or 1.0
        self._values = (values - self._shift) / self._scale
        self._known = known_variance / self._scale**2
        self._squares = (points[:, None, :] - points[None]) ** 2
        begin = start or Hyperparameters.prior_mean(points.shape[1])
        self.hyperparameters = self._fitted(begin) if fit else begin
        kernel = self._kernel(self._squares, self.hyperparameters.values)
        self._factor = np.linalg.cholesky(kernel + np.diag(self._noise(self.hyperparameters.values)))
        self._weights = cho_solve((self._factor, True), self._values)

    def posterior(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean (k,) and standard deviation (k,) of the noise-free function at `points` (k, d)."""
        cross = self._kernel((points[:, None, :] - self._points[None]) ** 2, self.hyperparameters.values)
        half = solve_triangular(self._factor, cross.T, lower=True)
        signal = np.exp(self.hyperparameters.values[-2])
        deviation = np.sqrt(np.maximum(signal - (half**2).sum(axis=0), 1e-14))
        return cross @ self._weights * self._scale + self._shift, deviation * self._scale

    def sample(self, points: Floats, normals: Floats) -> Floats:
        """Joint draws (s, k) of the noise-free function at `points` (k, d) from standard `normals` (s, k)."""
        cross = self._kernel((points[:, None, :] - self._points[None]) ** 2, self.hyperparameters.values)
        half = solve_triangular(self._factor, cross.T, lower=True)
        prior = self._kernel((points[:, None, :] - points[None]) ** 2, self.hyperparameters.values)
        covariance = prior - half.T @ half
        root = _lower_root(covariance)
        return np.asarray((cross @ self._weights + normals @ root.T) * self._scale + self._shift)

    def _noise(self, values: Floats) -> Floats:
        return np.asarray(np.exp(values[-1]) + self._known + _JITTER)

    @staticmethod
    def _kernel(squares: Floats, values: Floats) -> Floats:
        distance = np.sqrt(np.maximum(squares @ np.exp(-2.0 * values[:-2]), 0.0))
        scaled = _ROOT5 * distance
        return np.asarray(np.exp(values[-2]) * (1.0 + scaled + scaled**2 / 3.0) * np.exp(-scaled))

    def _fitted(self, start: Hyperparameters) -> Hyperparameters:
        dimension = self._points.shape[1]
        bounds = [(-4.0, 6.0)] * dimension + [(-4.0, 4.0), (-16.0, 1.0)]
        origin = np.clip(start.values, *np.array(bounds).T)
        result = minimize(self._objective, origin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        return Hyperparameters(np.asarray(result.x, dtype=np.float64))

    def _objective(self, values: Floats) -> tuple[float, Floats]:
        """Negative log posterior of the hyperparameters and its gradient."""
        dimension = len(values) - 2
        inverse_squares = np.exp(-2.0 * values[:-2])
        scaled = _ROOT5 * np.sqrt(np.maximum(self._squares @ inverse_squares, 0.0))
        decay = np.exp(values[-2] - scaled)
        kernel = decay * (1.0 + scaled + scaled**2 / 3.0)
        try:
            factor = cho_factor(kernel + np.diag(self._noise(values)), lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(values)
        weights = cho_solve(factor, self._values)
        log_likelihood = -0.5 * self._values @ weights - np.log(np.diag(factor[0])).sum()
        inner = 0.5 * (np.outer(weights, weights) - cho_solve(factor, np.eye(len(weights))))
        # d kernel / d log length_i = 5/3 (1 + r) exp(-r) signal * (x_i - y_i)^2 / length_i^2, r = sqrt 5 * distance
        slope = inner * (5.0 / 3.0) * decay * (1.0 + scaled)
        gradient = np.empty_like(values)
        gradient[:-2] = np.tensordot(slope, self._squares, axes=2) * inverse_squares
        gradient[-2] = np.sum(inner * kernel)
        gradient[-1] = np.trace(inner) * np.exp(values[-1])
        means = np.append(np.full(dimension, 0.5 * np.log(dimension)), [0.0, _LOG_NOISE[0]])
        variances = np.append(np.full(dimension, 0.5), [1.0, _LOG_NOISE[1] ** 2])
        deviation = values - means
        log_prior = -0.5 * np.sum(deviation**2 / variances)
        return -(log_likelihood + log_prior), -(gradient - deviation / variances)


def _lower_root(covariance: Floats) -> Floats:
    """Cholesky root of a covariance (k, k) that close points make near-singular: the smallest jitter that works."""
    scale = max(float(covariance.diagonal().max()), 1e-12)
    for power in range(-9, -1):
        try:
            return np.asarray(np.linalg.cholesky(covariance + 10.0**power * scale * np.eye(len(covariance))))
        except np.linalg.LinAlgError:
            continue
    return np.asarray(np.diag(np.sqrt(np.maximum(covariance.diagonal(), 0.0))))
