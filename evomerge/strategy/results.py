"""Converts evaluations to the form that algorithms see: losses to be minimised, or None. Knows nothing of algorithms."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.core import Candidate, Evaluation, Objective, to_losses
from evomerge.strategy.base import Told

_LARGEST_LOSS = 1e150
"""Squares of larger losses overflow; such a loss, for example the perplexity of a ruined model, is treated as missing."""


def results_of(
    objectives: Sequence[Objective],
    candidates: Sequence[Candidate],
    evaluations: Sequence[Evaluation],
    *,
    with_items: bool,
) -> list[Told]:
    """The results of `candidates`, one for each; with item scores only if `with_items`."""
    losses = to_losses(objectives, evaluations)
    results = []
    for candidate, evaluation, row in zip(candidates, evaluations, losses, strict=True):
        if not (np.abs(row) <= _LARGEST_LOSS).all():
            results.append(Told(candidate, None, None))
            continue
        errors = [float(evaluation.stderr.get(objective.name, 0.0)) for objective in objectives]
        stderr = tuple(error if np.isfinite(error) and error > 0.0 else 0.0 for error in errors)
        items = _items_of(objectives, evaluation) if with_items else None
        results.append(Told(candidate, tuple(float(value) for value in row), stderr, items))
    return results


def _items_of(objectives: Sequence[Objective], evaluation: Evaluation) -> NDArray[np.float32] | None:
    parts = [
        np.asarray(evaluation.item_scores[goal.name], dtype=np.float32) * goal.sign
        for goal in objectives
        if goal.name in evaluation.item_scores
    ]
    return np.concatenate(parts).astype(np.float32) if parts else None
