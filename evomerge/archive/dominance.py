"""Pareto dominance on losses. It knows nothing of candidates: rows of numbers in, masks out.

All losses are minimised. A row with a NaN is no point at all: it dominates nothing and is in no front.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated_mask(losses: ArrayLike) -> NDArray[np.bool_]:
    """Which rows of `losses` (n, m) no other row dominates; rows that are equal are all kept. Shape (n,).

    Raises:
        ValueError: `losses` is not two-dimensional.
    """
    from moocore import is_nondominated

    points = np.asarray(losses, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"losses must have shape (n, m), got {points.shape}")
    mask = np.asarray(np.isfinite(points).all(axis=1), dtype=np.bool_)
    if mask.any():
        mask[mask] = is_nondominated(points[mask], keep_weakly=True)
    return mask
