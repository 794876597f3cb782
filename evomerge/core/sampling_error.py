"""The standard error of a mean over items that come from one or several samples."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["standard_error"]


def standard_error(values: NDArray[np.floating], sizes: Sequence[int] = ()) -> float:
    """Standard error of the mean of `values`, shape (n,).

    Args:
        values: one per item.
        sizes: number of items of each independent sample, in order, such as the tasks of a group, whose means may differ; empty = a single sample.

    Returns:
        The sample standard deviation divided by sqrt(n); for several samples, combined from their standard errors, where a sample of one item
        counts as 0.
    """
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else [values]
    errors = [part.std(ddof=1) / math.sqrt(len(part)) if len(part) > 1 else 0.0 for part in parts]
    return float(math.hypot(*(len(part) * error for part, error in zip(parts, errors, strict=True))) / len(values))
