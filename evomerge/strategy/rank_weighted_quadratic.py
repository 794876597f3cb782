"""A linear, then diagonal, then full quadratic of the latest results, fitted with weights by rank: what `cma_es` ranks by.

The model of lq-CMA-ES (Hansen 2019, 10.1145/3321707.3321842). It knows points and losses, nothing of a distribution: which
results it keeps is told to it by their order. Coordinates are shifted to the best point and scaled before the fit, so that it
stays exact when a search has narrowed in by eight orders of magnitude.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, lstsq
from scipy.stats import kendalltau

Floats = NDArray[np.float64]

_MIN_RESULTS = 3
"""Fewer say nothing about a slope."""
_KEPT = 0.75
"""The worse quarter of the archive is left out of the fit."""
_SURPLUS = 1.1
"""So many results per coefficient before the model grows."""
_MAX_WEIGHT = 20.0
"""Of the best result's residual; the worst has 1."""
_N_COMPARED = 15
"""Agreement is judged on so many of the latest results."""


class RankWeightedQuadratic:
    """Archive and fit.

    Args:
        dimension: d.
        min_archive: results that are kept at least; beyond two per coefficient of a full quadratic, or five of a diagonal one, the oldest go.
        full: whether the model may grow from a diagonal to a full quadratic. Where it may not there are many dimensions, and a line
            through fewer points than it has coefficients, which orders just those as they are, is of no use.

    Attributes:
        min_results: with fewer it is not to be asked.
    """

    def __init__(self, dimension: int, min_archive: int, *, full: bool = True) -> None:
        self._dimension = dimension
        sizes = (dimension + 1, 2 * dimension + 1, (dimension + 1) * (dimension + 2) // 2)
        self._coefficients_of = sizes if full else sizes[:2]
        self._max_archive = max(min_archive, (2 if full else 5) * self._coefficients_of[-1])
        self.min_results = _MIN_RESULTS if full else ceil(_SURPLUS * sizes[0] / _KEPT)
        self._points: Floats = np.empty((0, dimension))
        self._losses: Floats = np.empty(0)
        self._level = 0
        self._fit: tuple[Floats, Floats, Floats] | None = None
        self._rows, self._columns = np.triu_indices(dimension, 1)

    def __len__(self) -> int:
        """Results in the archive."""
        return len(self._losses)

    def add(self, point: Floats, loss: float) -> None:
        """Takes in a result; it is the latest."""
        self._points = np.vstack([point, self._points])[: self._max_archive]
        self._losses = np.append(loss, self._losses)[: self._max_archive]
        # a model that was good enough to grow does not shrink again
        while (
            self._level + 1 < len(self._coefficients_of)
            and len(self) * _KEPT >= _SURPLUS * self._coefficients_of[self._level + 1]
        ):
            self._level += 1
        self._fit = None

    def sort_latest(self, count: int) -> None:
        """Orders the `count` latest results by loss, so that the better of them stay longer."""
        order = np.argsort(self._losses[:count], kind="stable")
        self._points[:count] = self._points[:count][order]
        self._losses[:count] = self._losses[:count][order]

    def predict(self, points: Floats) -> Floats:
        """Modelled losses (k,) at `points` (k, d); needs `min_results`."""
        coefficients, centre, scale = self._fitted()
        return np.asarray(self._features((points - centre) / scale) @ coefficients)

    def agreement(self, n_evaluated: int) -> float:
        """Kendall's tau between losses and model at the latest results, `n_evaluated` of which belong to this generation."""
        count = min(len(self), max(_N_COMPARED, int(1.2 * n_evaluated)))
        if count < _MIN_RESULTS:
            return 0.0
        tau = float(kendalltau(self._losses[:count], self.predict(self._points[:count]))[0])
        return tau if np.isfinite(tau) else 0.0

    def minimum(self, mean: Floats, root: Floats, radius: float) -> Floats:
        """The model's minimum (d,) among mean + root z, |z| <= radius; `root` (d, d) shapes the trust region."""
        coefficients, centre, scale = self._fitted()
        d = self._dimension
        slope, hessian = coefficients[1 : d + 1], np.zeros((d, d))
        if self._level > 0:
            hessian[np.diag_indices(d)] = 2.0 * coefficients[d + 1 : 2 * d + 1]
        if self._level > 1:
            hessian[self._rows, self._columns] = hessian[self._columns, self._rows] = coefficients[2 * d + 1 :]
        offset = (mean - centre) / scale
        scaled = root / scale[:, None]
        step = trust_region_step(scaled.T @ (slope + hessian @ offset), scaled.T @ hessian @ scaled, radius)
        return np.asarray(mean + root @ step)

    def _fitted(self) -> tuple[Floats, Floats, Floats]:
        if self._fit is None:
            n_needed = max(self._coefficients_of[self._level] + 2, int(_KEPT * (len(self) + 1)))
            best = np.argsort(self._losses, kind="stable")[:n_needed]
            points, losses = self._points[best], self._losses[best]
            centre = points[0]
            scale = np.maximum(np.abs(points - centre).max(axis=0), 1e-300)
            weights = np.linspace(_MAX_WEIGHT, 1.0, len(best))
            design = self._features((points - centre) / scale) * weights[:, None]
            # the best loss is taken out, or it would swamp the differences late in a search
            solution = lstsq(design, (losses - losses[0]) * weights, cond=1e-13, lapack_driver="gelsy")[0]
            self._fit = (np.asarray(solution), centre, scale)
        return self._fit

    def _features(self, points: Floats) -> Floats:
        parts = [np.ones((len(points), 1)), points]
        if self._level > 0:
            parts.append(points**2)
        if self._level > 1:
            parts.append(points[:, self._rows] * points[:, self._columns])
        return np.hstack(parts)


def trust_region_step(slope: Floats, hessian: Floats, radius: float) -> Floats:
    """The z (d,) that minimises slope . z + z . hessian . z / 2 over |z| <= radius (Moré and Sorensen, 10.1137/0904038)."""
    values, vectors = eigh(hessian)
    turned = vectors.T @ slope
    if not turned.any():
        return np.zeros_like(slope)
    floor = max(0.0, -float(values[0]))
    shift = 0.0
    if values[0] <= 0.0 or np.linalg.norm(turned / values) > radius:
        # |z(shift)| falls with the shift; the bracket's upper end is short enough by Cauchy-Schwarz
        low, high = floor, floor + float(np.linalg.norm(turned)) / radius + 1e-300
        for _ in range(60):
            shift = 0.5 * (low + high)
            too_long = np.linalg.norm(turned / np.maximum(values + shift, 1e-300)) > radius
            low, high = (shift, high) if too_long else (low, shift)
        shift = high
    return np.asarray(vectors @ (-turned / np.maximum(values + shift, 1e-300)))
