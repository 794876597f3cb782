"""Categorical coordinates: choice i of n is the interval [i / n, (i + 1) / n) of unit coordinates, represented by its middle."""

import numpy as np
from numpy.typing import NDArray


def choices_at(points: NDArray[np.float64], counts: NDArray[np.int_]) -> NDArray[np.float64]:
    """The choices (whole numbers from 0) at unit coordinates `points` with `counts` choices each; both of shape (k,)."""
    return np.asarray(np.minimum(np.floor(points * counts), counts - 1))


def middles_of(choices: NDArray[np.float64] | NDArray[np.int_], counts: NDArray[np.int_]) -> NDArray[np.float64]:
    """The unit coordinates (k,) of choices (k,)."""
    return np.asarray((choices + 0.5) / counts, dtype=np.float64)


def placed(points: NDArray[np.float64], counts: NDArray[np.int_]) -> NDArray[np.float64]:
    """`points` (..., d) with categorical coordinates moved to the middles of their choices; `counts` (d,), 0 for real coordinates."""
    discrete = counts > 0
    moved = points.copy()
    moved[..., discrete] = middles_of(choices_at(points[..., discrete], counts[discrete]), counts[discrete])
    return moved
