"""What MAP does with quadratic surrogates: fit one per objective, find their Pareto front, choose from it. No state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist

from evomerge.archive import hypervolume, non_dominated_mask
from evomerge.core import Json, Objective
from evomerge.strategy.base import Floats
from evomerge.strategy.quadratic_model import QuadraticModel, choose_link, fit_quadratic

LinkChoice = Literal["auto", "identity", "logit", "softplus"]

_POOL = 512
_FRONT = 64
_STEPS = (0.2, 0.1, 0.05, 0.02, 0.01)
_CLOSE = 1e-3
"""Proposals nearer than this (per root dimension) to a known point are worth no evaluation."""


@dataclass(frozen=True)
class Surrogates:
    """One quadratic per objective.

    Attributes:
        objectives: m of them.
        models: of their scores.
        variances: (m,) of what they were fitted to.
    """

    objectives: tuple[Objective, ...]
    models: tuple[QuadraticModel, ...]
    variances: Floats

    @classmethod
    def fitted(
        cls,
        points: Floats,
        losses: Floats,
        objectives: tuple[Objective, ...],
        link: LinkChoice,
        *,
        diagonal: bool = False,
    ) -> "Surrogates":
        """Surrogates of losses (n, m) at unit points (n, d), n >= 2.

        With `link` "auto", where `choose_link` finds softplus, the identity takes turns with it, by the parity of n.
        """
        models = []
        for goal, column in zip(objectives, losses.T, strict=True):
            scores = -goal.sign * column
            chosen = choose_link(scores) if link == "auto" else link
            if link == "auto" and chosen == "softplus" and len(scores) % 2 == 1:
                chosen = "identity"
            models.append(fit_quadratic(points, scores, chosen, diagonal=diagonal))
        return cls(objectives, tuple(models), losses.var(axis=0))

    def predict(self, points: Floats) -> Floats:
        """Losses (k, m) at unit points (k, d)."""
        pairs = zip(self.objectives, self.models, strict=True)
        return np.column_stack([-goal.sign * model.predict(points) for goal, model in pairs])

    def quality(self) -> dict[str, Json]:
        """Objective name -> leave-one-out R2."""
        return {goal.name: model.loo_r2 for goal, model in zip(self.objectives, self.models, strict=True)}

    def relative_errors(self) -> Floats:
        """Squared leave-one-out errors (n,) in units of each objective's variance, averaged over the objectives."""
        errors = np.column_stack([model.loo_errors for model in self.models])
        return np.asarray(np.mean(errors**2 / np.where(self.variances > 0.0, self.variances, 1.0), axis=1))


def predicted_front(surrogates: Surrogates, points: Floats, generator: np.random.Generator) -> Floats:
    """At most `_FRONT` points of the unit cube that no other is predicted to dominate.

    The known `points` and a random pool are perturbed in widening, then narrowing steps.
    """
    dimension = points.shape[1]
    pool = np.vstack([points, generator.random((_POOL, dimension))])
    for step in _STEPS:
        keep = _thinned(surrogates, pool)
        moved = keep[generator.integers(len(keep), size=_POOL)]
        mask = generator.random(moved.shape) < max(0.3, 1.0 / dimension)
        moved = np.clip(moved + step * mask * generator.standard_normal(moved.shape), 0.0, 1.0)
        pool = np.vstack([keep, moved])
    return _thinned(surrogates, pool)


def most_promising(pool: Floats, predicted: Floats, known: Floats, taken: Floats) -> tuple[float, ...] | None:
    """The point of `pool` (k, d) whose `predicted` losses (k, m) add most hypervolume to the `known` losses (n, m).

    Points next to one of `taken` (t, d) are left out; where none adds anything, the one farthest from those is taken. None where every
    point is next to one of them.
    """
    front = known[non_dominated_mask(known)]
    spread = np.ptp(known, axis=0)
    reference = front.max(axis=0) + 0.1 * np.where(spread > 0.0, spread, 1.0)
    volume = hypervolume(front, reference)
    gains = np.array([hypervolume(np.vstack([front, row]), reference) - volume for row in predicted])
    distance = cdist(pool, taken).min(axis=1)
    gains[distance < _CLOSE * np.sqrt(pool.shape[1])] = -1.0
    best = int(np.argmax(gains)) if gains.max() > 0.0 else int(np.argmax(distance))
    return None if gains[best] < 0.0 else tuple(pool[best].tolist())


def as_array(points: Sequence[tuple[float, ...]], dimension: int) -> Floats:
    """(n, d), also where n is 0."""
    return np.array(points, dtype=np.float64).reshape(len(points), dimension)


def _thinned(surrogates: Surrogates, pool: Floats) -> Floats:
    """The non-dominated part of `pool`, thinned evenly along the first objective where it is larger than `_FRONT`."""
    predicted = surrogates.predict(pool)
    rows = np.flatnonzero(non_dominated_mask(predicted))
    if len(rows) > _FRONT:
        order = rows[np.argsort(predicted[rows, 0], kind="stable")]
        rows = order[np.linspace(0, len(order) - 1, _FRONT).round().astype(int)]
    return pool[rows]
