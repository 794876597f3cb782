"""`map`: amortised Pareto fronts from quadratic surrogates (MAP, arXiv 2406.07529), one proposal at a time.

First a Sobol design, then every proposal is the point of the surrogates' Pareto front that promises most hypervolume
beyond the evaluated front. Deviations from the paper: the surrogate is a ridge-regularised weighted fit (see
`quadratic_model`), it is refitted after every result instead of once, the front is searched inside the sampled box and not
on [-3, 3]^d, and chosen points are really evaluated.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from evomerge.archive import hypervolume, non_dominated_mask
from evomerge.core import ConfigError, Direction, Json, VectorGenome, random_stream
from evomerge.strategy.base import Proposal, StrategyOptions, Told, candidate_id
from evomerge.strategy.quadratic_model import (
    Floats,
    QuadraticModel,
    choose_link,
    fit_quadratic,
    n_coefficients,
    quadratic_features,
)
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.sampling import SobolStream

_MAX_DIMENSION = 40
"""861 coefficients; more cannot be learned from the budgets this strategy is for."""
_POOL = 512
_FRONT = 64
_STEPS = (0.2, 0.1, 0.05, 0.02, 0.01)


class MapOptions(StrategyOptions):
    """Options of `map`."""

    n_initial: int | None = Field(
        None,
        ge=2,
        description="points of the first design, seeds included; None: one per two coefficients, (d + 1)(d + 2) / 4, at least 2 d + 2",
    )
    link: Literal["auto", "identity", "logit", "softplus"] = Field(
        "auto",
        description="from the quadratic to the score; auto: logit for scores in [0, 1], softplus above 0, else identity",
    )


class MapSurrogate(ReplayStrategy):
    """Quadratic surrogates and their Pareto front.

    FAILED and INFEASIBLE candidates are left out of the fit, and pending ones count with their predicted losses. Seeds are
    part of the design. `surrogate_quality` tells the leave-one-out R2 per objective.
    """

    name: ClassVar[str] = "map"
    options_type: ClassVar[type[StrategyOptions]] = MapOptions
    options: MapOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dimension > _MAX_DIMENSION:
            raise ConfigError(
                f"strategy map: {self.dimension} dimensions need {n_coefficients(self.dimension)} coefficients per objective; "
                f"it takes at most {_MAX_DIMENSION}. Use fewer layer groups, or cma_es or nsga2"
            )
        self._n_initial = self.options.n_initial or max(n_coefficients(self.dimension) // 2, 2 * self.dimension + 2)
        self._design = SobolStream(self.dimension, random_stream(self.random_seed, "map", "design"))
        self._signs = np.array([-1.0 if goal.direction is Direction.MAXIMIZE else 1.0 for goal in self.objectives])
        self._points: list[tuple[float, ...]] = []
        self._losses: list[tuple[float, ...]] = []
        self._open: dict[str, tuple[float, ...]] = {}
        self._failed: list[tuple[float, ...]] = []
        self._n_refined = 0

    def surrogate_quality(self) -> Mapping[str, Json]:
        """Objective name -> leave-one-out R2 of its surrogate; empty before two results."""
        if len(self._points) < 2:
            return {}
        return {goal.name: model.loo_r2 for goal, model in zip(self.objectives, self._fit(), strict=True)}

    def _propose(self) -> Proposal:
        if len(self._points) + len(self._open) < self._n_initial or len(self._points) < 2:
            values = self._design.next().values
        else:
            values = self._refine()
        self._open[candidate_id(self._n_asked + 1)] = values
        return Proposal(VectorGenome(values))

    def _learn(self, told: Told) -> None:
        self._open.pop(told.candidate.id, None)
        if told.losses is None:
            self._failed.append(told.candidate.point)
        else:
            self._points.append(told.candidate.point)
            self._losses.append(told.losses)

    def _fit(self) -> list[QuadraticModel]:
        points, losses = np.array(self._points), np.array(self._losses)
        models = []
        for column, sign in enumerate(self._signs):
            scores = sign * losses[:, column]
            link = choose_link(scores) if self.options.link == "auto" else self.options.link
            models.append(fit_quadratic(points, scores, link))
        return models

    def _predict(self, models: list[QuadraticModel], points: Floats) -> Floats:
        features = quadratic_features(points)
        return np.column_stack(
            [sign * model.predict(features) for sign, model in zip(self._signs, models, strict=True)]
        )

    def _refine(self) -> tuple[float, ...]:
        """The point of the predicted front with most hypervolume beyond what is known or pending."""
        self._n_refined += 1
        generator = random_stream(self.random_seed, "map", "refine", self._n_refined)
        models = self._fit()
        pool = self._predicted_front(models, generator)
        predicted = self._predict(models, pool)
        known = np.array(self._losses)
        if self._open:
            known = np.vstack([known, self._predict(models, np.array(list(self._open.values())))])
        front = known[non_dominated_mask(known)]
        worst, spread = front.max(axis=0), np.ptp(known, axis=0)
        reference = worst + 0.1 * np.where(spread > 0.0, spread, 1.0)
        volume = hypervolume(front, reference)
        gains = np.array([hypervolume(np.vstack([front, row]), reference) - volume for row in predicted])
        taken = np.array([*self._points, *self._open.values(), *self._failed])
        distance = np.sqrt(((pool[:, None, :] - taken[None]) ** 2).sum(axis=2)).min(axis=1)
        gains[distance < 1e-3 * np.sqrt(self.dimension)] = -1.0
        best = int(np.argmax(gains)) if gains.max() > 0.0 else int(np.argmax(distance))
        return tuple(pool[best].tolist())

    def _predicted_front(self, models: list[QuadraticModel], generator: np.random.Generator) -> Floats:
        """At most `_FRONT` points that are non-dominated under the surrogates, by widening then narrowing perturbation."""
        pool = np.vstack([np.array(self._points), generator.random((_POOL, self.dimension))])
        for step in _STEPS:
            keep = self._thinned(models, pool)
            moved = keep[generator.integers(len(keep), size=_POOL)]
            mask = generator.random(moved.shape) < max(0.3, 1.0 / self.dimension)
            moved = np.clip(moved + step * mask * generator.standard_normal(moved.shape), 0.0, 1.0)
            pool = np.vstack([keep, moved])
        return self._thinned(models, pool)

    def _thinned(self, models: list[QuadraticModel], pool: Floats) -> Floats:
        """The non-dominated part of `pool`, thinned evenly along the first objective where it is larger than `_FRONT`."""
        predicted = self._predict(models, pool)
        rows = np.flatnonzero(non_dominated_mask(predicted))
        if len(rows) > _FRONT:
            order = rows[np.argsort(predicted[rows, 0], kind="stable")]
            rows = order[np.linspace(0, len(order) - 1, _FRONT).round().astype(int)]
        return pool[rows]
