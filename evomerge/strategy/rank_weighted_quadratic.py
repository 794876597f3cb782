"""A quadratic of the latest results that grows with them, fitted with weights by rank: what `cma_es` ranks by.

The model of lq-CMA-ES (Hansen 2019, 10.1145/3321707.3321842): linear, then diagonal, then full. It knows points and losses, nothing of a
distribution: which results it keeps is told to it by their order. Coordinates are shifted to the best point and scaled before the fit, so
that it stays exact when a search has narrowed in by eight orders of magnitude.

Where coordinates come in families it begins with a quadratic of the families' means, their levels, which takes a few coefficients
whatever the number of coordinates; those of the single coordinates follow.
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
"""Fewer say nothing about a slope."""
_KEPT = 0.75
"""The worse quarter of the archive is left out of the fit."""
_SURPLUS = 1.1
"""So many results per coefficient before the model grows."""
_MAX_WEIGHT = 20.0
"""Of the best result's residual; the worst has 1."""
_N_COMPARED = 15
"""Agreement is judged on so many of the latest results."""
_LEAST_SCALE = 1e-16
"""Coordinates are in [0, 1], and what is less apart differs by rounding."""
_ROUNDING = 1e-12
"""Curvatures and slopes that are smaller, relative to the largest, are taken for 0."""


class _Terms(NamedTuple):
    """What a quadratic is made of, in numbers of the linear forms that it knows: those of its own, and pairs that are multiplied."""

    linear: NDArray[np.intp]
    first: NDArray[np.intp]
    second: NDArray[np.intp]

    @property
    def n_coefficients(self) -> int:
        return 1 + len(self.linear) + len(self.first)


class RankWeightedQuadratic:
    """Archive and fit.

    Args:
        dimension: d.
        min_archive: results that are kept at least; beyond two per coefficient of a full quadratic, or five of a diagonal one, the oldest go.
        full: whether the model may grow from a diagonal to a full quadratic. False is for many dimensions: there it is asked only once it has
            more results than coefficients, since a fit to fewer reproduces their order whatever they are.
        families: (d,) the number of each coordinate's family, from 0 on; None: no two coordinates belong together.

    Attributes:
        min_results: with fewer it is not to be asked.
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
        """Results in the archive."""
        return len(self._losses)

    def add(self, point: Floats, loss: float) -> None:
        """Takes in a result; it is the latest."""
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
        """Orders the `count` latest results by loss, so that the better of them stay longer."""
        order = np.argsort(self._losses[:count], kind="stable")
        self._points[:count] = self._points[:count][order]
        self._losses[:count] = self._losses[:count][order]

    def predict(self, points: Floats) -> Floats:
        """Modelled losses (k,), less the best known one, at `points` (k, d); needs `min_results`."""
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
            # one scale for a family, so that its mean stays its mean
            spread = np.where(self._together, np.abs(points - centre).max(axis=0), 0.0).max(axis=1)
            scale = np.maximum(spread, _LEAST_SCALE)
            weights = np.linspace(_MAX_WEIGHT, 1.0, len(best))
            design = self._features((points - centre) / scale) * weights[:, None]
            # the best loss is taken out, or it would swamp the differences late in a search
            solution = lstsq(design, (losses - losses[0]) * weights, cond=1e-13, lapack_driver="gelsy")[0]
            self._fit = (np.asarray(solution), centre, scale)
        return self._fit

    def _features(self, points: Floats) -> Floats:
        terms, forms = self._stages[self._stage], points @ self._forms
        return np.hstack(
            [np.ones((len(points), 1)), forms[:, terms.linear], forms[:, terms.first] * forms[:, terms.second]]
        )


def _stages(dimension: int, n_forms: int, shared: NDArray[np.bool_]) -> list[_Terms]:
    """The quadratics that a model grows through; the last is full. Forms are numbered, coordinates first, then levels.

    Args:
        dimension: d.
        n_forms: d, and the number of levels.
        shared: (d,) whether a coordinate is not the only one of its family, whose level it would be.
    """
    none, single, levels = np.arange(0), np.arange(dimension), np.arange(dimension, n_forms)
    full = _Terms(single, *_pairs(single))
    if n_forms == dimension:
        return [_Terms(single, none, none), _Terms(single, single, single), full]
    growing = [_Terms(levels, none, none), _Terms(levels, levels, levels)]
    first, second = levels, levels
    # the products of more than three levels would take longer to learn than what they are worth: not before those of all coordinates
    if len(levels) <= 3:
        first, second = _pairs(levels)
        growing.append(_Terms(levels, first, second))
    squares = single[shared]
    growing.append(_Terms(single, first, second))
    growing.append(_Terms(single, np.append(first, squares), np.append(second, squares)))
    return [*growing, full]


def _pairs(numbers: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Every number with itself, then every two of them."""
    rows, columns = np.triu_indices(len(numbers), 1)
    return np.append(numbers, numbers[rows]), np.append(numbers, numbers[columns])


def trust_region_step(slope: Floats, hessian: Floats, radius: float) -> Floats:
    """The z (d,) that minimises slope . z + z . hessian . z / 2 over |z| <= radius (Moré and Sorensen, 10.1137/0904038)."""
    values, vectors = eigh(hessian)
    turned = vectors.T @ slope
    # where the model knows nothing of a direction, what is left of it is rounding and would fill the radius
    flat = np.abs(values) <= _ROUNDING * np.abs(values).max()
    turned[flat & (np.abs(turned) <= _ROUNDING * np.linalg.norm(turned))] = 0.0
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
