"""Bayesian MAP's sampling (arXiv 2406.07529): new points where the surrogates err most, by bins of the direction.

The released code means this and does something else: there an unvisited bin is never drawn, the errors are those of the
first points for ever, and dropped points stay dropped. Here an unvisited bin is as interesting as the worst one known,
and every result counts. Errors are leave-one-out errors, in units of the objective's variance.
"""

import numpy as np
from numpy.typing import NDArray

from evomerge.strategy.base import Floats

MAX_BINNED_DIMENSION = 6
"""2^5 bins; beyond that, every bin is unvisited and the method is uniform sampling (paper: 4 to 6 with two bins an angle)."""

_TEMPERATURE = 0.07
_N_RESAMPLED = 30
_KEPT = 0.8
_SPREAD_WEIGHT = 0.5
_MIN_RADIUS = 0.2


def bins_per_angle(dimension: int) -> int:
    """4 up to three dimensions, then 2 (paper)."""
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
    """How interesting each bin is: the mean of `errors` (n,) in it plus half the spread of that mean when a fifth is dropped.

    Bins without any point get the highest of the others' scores, bins that only hold `pending` points (p, d) their mean.
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
    """A new point of the unit cube: a bin by softmax of the scores, uniform angles in it, a radius within the cube.

    Radii are uniform between a fifth of the way to the cube's surface and the surface. (The paper's, 0.2 to 0.8
    whatever the direction, never reach the point where all sources have full weight.)
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
