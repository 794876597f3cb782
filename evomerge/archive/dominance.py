"""Pareto dominance on arrays of losses, all to be minimised.

A row with a value that is not finite is ignored: it dominates nothing and is never non-dominated.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated_mask(losses: ArrayLike) -> NDArray[np.bool_]:
    """A mask (n,) of the rows of `losses` (n, m) that no other row dominates; equal rows are all kept.

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
