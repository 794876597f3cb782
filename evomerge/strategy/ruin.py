"""Clips extreme losses for surrogates that are fitted to all results."""

import numpy as np

from evomerge.strategy.base import Floats

_RUINED = 5.0
"""Limit on a loss's distance from the median of the design, as a multiple of the best loss's distance; beyond it, the model is simply ruined."""


def tamed(losses: Floats, n_design: int) -> Floats:
    """Losses (n, m), clipped far above those of the first `n_design`: no smooth model fits both the perplexity of a ruined model and the rest.

    Objectives with scores within [0, 1] are left unchanged: when they were clipped, `map` found less on the digits experts.
    """
    design = losses[: max(n_design, 2)]
    middle = np.median(design, axis=0)
    reach = middle - design.min(axis=0)
    # if half of them equal the best, their distance says nothing about the others
    most = np.where(reach > 0.0, middle + _RUINED * reach, np.inf)
    return np.where(np.abs(losses).max(axis=0) > 1.0, np.minimum(losses, most), losses)
