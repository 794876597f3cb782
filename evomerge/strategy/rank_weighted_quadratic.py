"""The surrogate with which `cma_es` ranks points: a quadratic of the latest results that grows with their number, fitted with rank-based weights.

The model of lq-CMA-ES (Hansen 2019, 10.1145/3321707.3321842): linear, then diagonal, then full. It knows points and losses but nothing of a
distribution; their order determines which results it keeps. Coordinates are shifted to the best point and scaled before the fit, so
that it stays accurate when a search has narrowed by eight orders of magnitude.

If coordinates form families, it begins with a quadratic of the families' means, their levels, which needs few coefficients
whatever the number of coordinates; the single coordinates follow.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, lstsq
from scipy.stats import kendalltau

from evomerge.strategy.base import Floats

_MIN_RESULTS = 3
"""Minimum number of results; fewer do not determine a slope."""
_KEPT = 0.75
"""Fraction of the archive that is fitted; the worst quarter is left out."""
_SURPLUS = 1.1
"""Number of results per coefficient before the model grows."""
_MAX_WEIGHT = 20.0
"""Weight of the best result's residual; the worst has weight 1."""
_N_COMPARED = 15
"""Number of latest results on which agreement is judged."""
_LEAST_SCALE = 1e-16
"""Minimum scale of coordinates, which are in [0, 1]; smaller differences are rounding errors."""
_ROUNDING = 1e-12
"""Curvatures and slopes smaller than this, relative to the largest, are treated as 0."""


class _Terms(NamedTuple):
    """The terms of a quadratic, as indices of linear forms: linear terms, and pairs of factors of products."""

    linear: NDArray[np.intp]
    first: NDArray[np.intp]
    second: NDArray[np.intp]

    @property
    def n_coefficients(self) -> int:
        return 1 + len(self.linear) + len(self.first)


class RankWeightedQuadratic:
    """The archive of results and the fitted model.

    Args:
        dimension: d.
        min_archive: minimum capacity; otherwise the archive keeps two results per coefficient of a full quadratic, or five per coefficient of a
            diagonal one, and drops the oldest.
        full: whether the model may grow from a diagonal to a full quadratic. False is for many dimensions: the model is then used only once it
            has more results than coefficients, because a fit to fewer reproduces their order whatever they are.
        families: (d,), the index of each coordinate's family, from 0 on; None: no families.

    Attributes:
        min_results: minimum number of results for which the model may be used.
    """

    def __init__(
        self, dimension: int, min_archive: int, *, full: bool = True, families: Sequence[int] | None = None
    ) -> None:
        self._dimension = dimension
        numbers = np.arange(dimension) if families is None else np.array(families)
        self._together = np.equal.outer(numbers, numbers)
        # the linear forms: each coordinate, and each family's mean
        self._forms = np.eye(dimension)
        if families is not None:
            means = (self._together / self._together.sum(axis=1))[np.unique(numbers, return_index=True)[1]]
            self._forms = np.vstack([self._forms, means]).T
        self._stages = _stages(dimension, self._forms.shape[1], self._together.sum(axis=1) > 1)[: None if full else -1]
        largest, smallest = self._stages[-1].n_coefficients, self._stages[0].n_coefficients
        self._max_archive = max(min_archive, (2 if full else 5) * largest)
        overdetermined = not full or families is not None
        self.min_results = ceil(_SURPLUS * smallest / _KEPT) if overdetermined else _MIN_RESULTS
        self._points: Floats = np.empty((0, dimension))
        self._losses: Floats = np.empty(0)
        self._stage = 0
        self._fit: tuple[Floats, Floats, Floats] | None = None

    def __len__(self) -> int:
        """Number of results in the archive."""
        return len(self._losses)

    def worst(self) -> float | None:
        """The largest loss in the archive; None if it is empty."""
        return float(self._losses.max()) if len(self) else None

    def add(self, point: Floats, loss: float) -> None:
        """Add the latest result."""
        self._points = np.vstack([point, self._points])[: self._max_archive]
        self._losses = np.append(loss, self._losses)[: self._max_archive]
        # a model that was good enough to grow does not shrink again
        while (
            self._stage + 1 < len(self._stages)
            and len(self) * _KEPT >= _SURPLUS * self._stages[self._stage + 1].n_coefficients
        ):
            self._stage += 1
        self._fit = None

    def sort_latest(self, count: int) -> None:
        """Sort the `count` latest results by loss, so that better ones are kept longer."""
        order = np.argsort(self._losses[:count], kind="stable")
        self._points[:count] = self._points[:count][order]
        self._losses[:count] = self._losses[:count][order]

    def predict(self, points: Floats) -> Floats:
        """Predicted losses (k,), relative to the best known one, at `points` (k, d); needs `min_results`."""
        coefficients, centre, scale = self._fitted()
        return np.asarray(self._features((points - centre) / scale) @ coefficients)

    def agreement(self, n_evaluated: int) -> float:
        """Kendall's tau between losses and predictions at the latest results, `n_evaluated` of which belong to this generation."""
        count = min(len(self), max(_N_COMPARED, int(1.2 * n_evaluated)))
        if count < _MIN_RESULTS:
            return 0.0
        tau = float(kendalltau(self._losses[:count], self.predict(self._points[:count]))[0])
        return tau if np.isfinite(tau) else 0.0

    def minimum(self, mean: Floats, root: Floats, radius: float) -> Floats:
        """The model's minimum (d,) among mean + root z, |z| <= radius; `root` (d, d) shapes the trust region."""
        coefficients, centre, scale = self._fitted()
        terms = self._stages[self._stage]
        n_linear = len(terms.linear)
        slope = self._forms[:, terms.linear] @ coefficients[1 : n_linear + 1]
        half = (self._forms[:, terms.first] * coefficients[n_linear + 1 :]) @ self._forms[:, terms.second].T
        hessian = half + half.T
        offset = (mean - centre) / scale
        scaled = root / scale[:, None]
        step = trust_region_step(scaled.T @ (slope + hessian @ offset), scaled.T @ hessian @ scaled, radius)
        return np.asarray(mean + root @ step)

    def _fitted(self) -> tuple[Floats, Floats, Floats]:
        if self._fit is None:
            n_needed = max(self._stages[self._stage].n_coefficients + 2, int(_KEPT * (len(self) + 1)))
            best = np.argsort(self._losses, kind="stable")[:n_needed]
            points, losses = self._points[best], self._losses[best]
            centre = points[0]
            # the same scale for all coordinates of a family, so that the mean remains a mean
            spread = np.where(self._together, np.abs(points - centre).max(axis=0), 0.0).max(axis=1)
            scale = np.maximum(spread, _LEAST_SCALE)
            weights = np.linspace(_MAX_WEIGHT, 1.0, len(best))
            design = self._features((points - centre) / scale) * weights[:, None]
            # the best loss is subtracted; otherwise it would swamp the differences late in a search
            solution = lstsq(design, (losses - losses[0]) * weights, cond=1e-13, lapack_driver="gelsy")[0]
            self._fit = (np.asarray(solution), centre, scale)
        return self._fit

    def _features(self, points: Floats) -> Floats:
        terms, forms = self._stages[self._stage], points @ self._forms
        return np.hstack(
            [np.ones((len(points), 1)), forms[:, terms.linear], forms[:, terms.first] * forms[:, terms.second]]
        )


def _stages(dimension: int, n_forms: int, shared: NDArray[np.bool_]) -> list[_Terms]:
    """The sequence of quadratics through which a model grows; the last one is full. Forms are numbered: first coordinates, then levels.

    Args:
        dimension: d.
        n_forms: d plus the number of levels.
        shared: (d,), whether a coordinate shares its family with others (otherwise it equals the level).
    """
    none, single, levels = np.arange(0), np.arange(dimension), np.arange(dimension, n_forms)
    full = _Terms(single, *_pairs(single))
    if n_forms == dimension:
        return [_Terms(single, none, none), _Terms(single, single, single), full]
    growing = [_Terms(levels, none, none), _Terms(levels, levels, levels)]
    first, second = levels, levels
    # products of more than three levels take longer to learn than they are worth, so they only come with those of all coordinates
    if len(levels) <= 3:
        first, second = _pairs(levels)
        growing.append(_Terms(levels, first, second))
    squares = single[shared]
    growing.append(_Terms(single, first, second))
    growing.append(_Terms(single, np.append(first, squares), np.append(second, squares)))
    return [*growing, full]


def _pairs(numbers: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Every number paired with itself, then every pair of different numbers."""
    rows, columns = np.triu_indices(len(numbers), 1)
    return np.append(numbers, numbers[rows]), np.append(numbers, numbers[columns])


def trust_region_step(slope: Floats, hessian: Floats, radius: float) -> Floats:
    """The z (d,) that minimises slope . z + z . hessian . z / 2 over |z| <= radius (Moré and Sorensen, 10.1137/0904038)."""
    values, vectors = eigh(hessian)
    turned = vectors.T @ slope
    # in a direction about which the model knows nothing, the remaining slope is rounding and would use up the radius
    flat = np.abs(values) <= _ROUNDING * np.abs(values).max()
    turned[flat & (np.abs(turned) <= _ROUNDING * np.linalg.norm(turned))] = 0.0
    if not turned.any():
        return np.zeros_like(slope)
    floor = max(0.0, -float(values[0]))
    shift = 0.0
    if values[0] <= 0.0 or np.linalg.norm(turned / values) > radius:
        # |z(shift)| decreases with the shift; at the upper end of the bracket it is small enough, by Cauchy-Schwarz
        low, high = floor, floor + float(np.linalg.norm(turned)) / radius + 1e-300
        for _ in range(60):
            shift = 0.5 * (low + high)
            too_long = np.linalg.norm(turned / np.maximum(values + shift, 1e-300)) > radius
            low, high = (shift, high) if too_long else (low, shift)
        shift = high
    return np.asarray(vectors @ (-turned / np.maximum(values + shift, 1e-300)))
