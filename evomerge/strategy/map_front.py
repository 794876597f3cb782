"""MAP's use of quadratic surrogates: fit one per objective, find their Pareto front, choose from it. Stateless."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from evomerge.archive import hypervolume, non_dominated_mask
from evomerge.core import Json, Objective
from evomerge.space import placed
from evomerge.strategy.base import Floats
from evomerge.strategy.quadratic_model import QuadraticModel, choose_link, fit_quadratic
from evomerge.strategy.sampling import next_to

LinkChoice = Literal["auto", "identity", "logit", "softplus"]

_POOL = 512
_FRONT = 64
_STEPS = (0.2, 0.1, 0.05, 0.02, 0.01)
_CLOSE = 1e-3
"""Proposals closer than this (times the square root of the dimension) to a known point are not worth an evaluation."""


@dataclass(frozen=True)
class Surrogates:
    """One quadratic per objective.

    Attributes:
        objectives: the m objectives.
        models: models of their scores.
        variances: (m,), variances of the fitted losses.
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

        With `link` "auto", if `choose_link` gives softplus, it alternates with the identity by the parity of n.
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


def predicted_front(
    surrogates: Surrogates,
    points: Floats,
    failed: Floats,
    caution: float,
    taken: Floats,
    counts: NDArray[np.int_],
    generator: np.random.Generator,
) -> Floats:
    """At most `_FRONT` points of the unit cube that are predicted to be non-dominated.

    The known `points` and a random pool are perturbed in decreasing steps, in which categorical coordinates are redrawn. Points whose distance from a
    known one, times `caution`, exceeds that from one that has `failed` (f, d) are left out: the surrogates know nothing of failures, and their front may
    lie among these. If there are categorical coordinates, the points `taken` (t, d) are left out too, and the front may be empty.

    Args:
        counts: (d,), the number of choices of each categorical coordinate, 0 for real ones.
    """

    def promising(rows: Floats) -> Floats:
        if len(failed) == 0:
            return rows
        kept: NDArray[np.bool_] = caution * cdist(rows, points).min(axis=1) <= cdist(rows, failed).min(axis=1)
        return rows[kept]

    dimension, discrete = points.shape[1], counts > 0
    pool = promising(placed(np.vstack([points, generator.random((_POOL, dimension))]), counts))
    looked_at = [pool]
    for step in _STEPS:
        keep = _thinned(surrogates, pool)
        moved = keep[generator.integers(len(keep), size=_POOL)]
        mask = generator.random(moved.shape) < max(0.3, 1.0 / dimension)
        moved = np.clip(moved + step * mask * generator.standard_normal(moved.shape), 0.0, 1.0)
        if discrete.any():
            moved = placed(np.where(mask & discrete, generator.random(moved.shape), moved), counts)
        moved = promising(moved)
        looked_at.append(moved)
        pool = np.vstack([keep, moved])
    if discrete.any():
        pool = np.vstack(looked_at)
        pool = pool[~next_to(pool, taken, _CLOSE)]
        pool = np.unique(pool[non_dominated_mask(surrogates.predict(pool))], axis=0)
    return _thinned(surrogates, pool)


def most_promising(pool: Floats, predicted: Floats, known: Floats, taken: Floats) -> tuple[float, ...] | None:
    """The point of `pool` (k, d) whose `predicted` losses (k, m) add most hypervolume to the `known` losses (n, m).

    Points too close to one of `taken` (t, d) are excluded; if no point adds anything, the one farthest from these is chosen. None if
    all points are excluded.
    """
    if len(pool) == 0:
        return None
    front = known[non_dominated_mask(known)]
    spread = np.ptp(known, axis=0)
    reference = front.max(axis=0) + 0.1 * np.where(spread > 0.0, spread, 1.0)
    volume = hypervolume(front, reference)
    gains = np.array([hypervolume(np.vstack([front, row]), reference) - volume for row in predicted])
    gains[next_to(pool, taken, _CLOSE)] = -1.0
    best = int(np.argmax(gains)) if gains.max() > 0.0 else int(np.argmax(cdist(pool, taken).min(axis=1)))
    return None if gains[best] < 0.0 else tuple(pool[best].tolist())


def as_array(points: Sequence[tuple[float, ...]], dimension: int) -> Floats:
    """The points as an array (n, d), even if n is 0."""
    return np.array(points, dtype=np.float64).reshape(len(points), dimension)


def _thinned(surrogates: Surrogates, pool: Floats) -> Floats:
    """The non-dominated part of `pool`, thinned evenly along the first objective if it has more than `_FRONT` points."""
    predicted = surrogates.predict(pool)
    rows = np.flatnonzero(non_dominated_mask(predicted))
    if len(rows) > _FRONT:
        order = rows[np.argsort(predicted[rows, 0], kind="stable")]
        rows = order[np.linspace(0, len(order) - 1, _FRONT).round().astype(int)]
    return pool[rows]
