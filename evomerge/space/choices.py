"""Categorical coordinates: choice i of n is every unit coordinate in [i / n, (i + 1) / n), and stands in the middle."""

import numpy as np
from numpy.typing import NDArray


def choices_at(points: NDArray[np.float64], counts: NDArray[np.int_]) -> NDArray[np.float64]:
    """The choices, whole numbers from 0, at unit coordinates `points` that have `counts` choices each; both of shape (k,)."""
    return np.asarray(np.minimum(np.floor(points * counts), counts - 1))


def middles_of(choices: NDArray[np.float64] | NDArray[np.int_], counts: NDArray[np.int_]) -> NDArray[np.float64]:
    """The unit coordinates (k,) of choices (k,)."""
    return np.asarray((choices + 0.5) / counts, dtype=np.float64)
