"""Losses for surrogates that are fitted to all results: without the ends of the world."""

import numpy as np

from evomerge.strategy.base import Floats

_RUINED = 5.0
"""A loss so many times as far from the median of the design as its best one says no more than that the model is ruined."""


def tamed(losses: Floats, n_design: int) -> Floats:
    """Losses (n, m), cut off far above those of the first `n_design`: no smooth model goes through the perplexity of a ruined model and the rest.

    Objectives whose scores are within [0, 1] stay as they are: on the digits experts `map` found less otherwise.
    """
    design = losses[: max(n_design, 2)]
    middle = np.median(design, axis=0)
    reach = middle - design.min(axis=0)
    most = np.where(
        reach > 0.0, middle + _RUINED * reach, np.inf
    )  # half of them the best say nothing of how far others may be
    return np.where(np.abs(losses).max(axis=0) > 1.0, np.minimum(losses, most), losses)
