"""Bayesian MAP's sampling (arXiv 2406.07529): new points where the surrogates have the largest errors, by bins of the direction.

The released code differs from this intention: it never draws an unvisited bin, keeps the errors of the first points forever,
and dropped points stay dropped. Here an unvisited bin is as interesting as the worst known one, and all results are used.
Errors are leave-one-out errors, in units of the objective's variance.
"""

import numpy as np
from numpy.typing import NDArray

from evomerge.strategy.base import Floats

MAX_BINNED_DIMENSION = 6
"""2^5 bins; beyond that, nearly every bin is unvisited and the method becomes uniform sampling (paper: 4 to 6 with two bins per angle)."""

_TEMPERATURE = 0.07
_N_RESAMPLED = 30
_KEPT = 0.8
_SPREAD_WEIGHT = 0.5
_MIN_RADIUS = 0.2


def bins_per_angle(dimension: int) -> int:
    """4 for up to three dimensions, else 2 (paper)."""
    return 4 if dimension <= 3 else 2


def directions(points: Floats) -> Floats:
    """Hyperspherical angles (n, d - 1), each in [0, pi / 2], of points (n, d) with no negative coordinate."""
    squares = points**2
    rest = np.sqrt(np.cumsum(squares[:, ::-1], axis=1)[:, ::-1])
    return np.asarray(np.arctan2(rest[:, 1:], points[:, :-1]))


def bin_numbers(points: Floats) -> NDArray[np.int64]:
    """The bin (n,) of each point (n, d)."""
    k = bins_per_angle(points.shape[1])
    cells = np.minimum((directions(points) * (k / (np.pi / 2.0))).astype(np.int64), k - 1)
    return np.asarray(cells @ k ** np.arange(cells.shape[1]), dtype=np.int64)


def bin_scores(points: Floats, errors: Floats, pending: Floats, generator: np.random.Generator) -> Floats:
    """Score of each bin: the mean of its `errors` (n,) plus half the standard deviation of that mean when a fifth is dropped at random.

    Bins without points get the highest score of the others, and bins with only `pending` points (p, d) their mean.
    """
    n_bins = bins_per_angle(points.shape[1]) ** (points.shape[1] - 1)
    numbers = bin_numbers(points)
    scores = np.full(n_bins, -1.0)
    for number in np.unique(numbers):
        inside = errors[numbers == number]
        n_kept = max(1, round(_KEPT * len(inside)))
        means = [generator.permutation(inside)[:n_kept].mean() for _ in range(_N_RESAMPLED)]
        scores[number] = inside.mean() + _SPREAD_WEIGHT * np.std(means)
    visited = scores >= 0.0
    waiting = np.zeros(n_bins, dtype=bool)
    waiting[bin_numbers(pending)] = True
    filled = np.where(waiting, scores[visited].mean(), scores[visited].max())
    return np.where(visited, scores, filled)


def draw_where_wrong(
    points: Floats, errors: Floats, pending: Floats, generator: np.random.Generator
) -> tuple[float, ...]:
    """A new point of the unit cube: a bin drawn by softmax of the scores, uniform angles in it, and a radius within the cube.

    Radii are uniform between a fifth of the distance to the cube's surface and the surface. (The paper's radii, 0.2 to 0.8
    in every direction, never reach the point where all sources have full weight.)
    """
    dimension = points.shape[1]
    scores = bin_scores(points, errors, pending, generator)
    weights = np.exp((scores - scores.max()) / _TEMPERATURE)
    number = min(
        int(np.searchsorted(np.cumsum(weights), generator.random() * weights.sum(), side="right")), len(weights) - 1
    )
    k = bins_per_angle(dimension)
    cells = number // k ** np.arange(dimension - 1) % k
    angles = (cells + generator.random(dimension - 1)) * (np.pi / 2.0 / k)
    sines = np.append(1.0, np.cumprod(np.sin(angles)))
    unit = sines * np.append(np.cos(angles), 1.0)
    radius = _MIN_RADIUS + (1.0 - _MIN_RADIUS) * generator.random()
    return tuple(np.clip(radius * unit / unit.max(), 0.0, 1.0).tolist())
