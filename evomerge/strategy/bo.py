"""`bo`: Bayesian optimisation with a Gaussian process per objective, for tens to a few hundred expensive evaluations.

Several objectives: noisy expected hypervolume improvement (arXiv 2105.08195) by joint posterior draws, in which pending
points count with the drawn values, so any number of workers can be busy. One objective: the same with improvement over
the best drawn value. The acquisition is maximised over a pool that narrows in on the predicted front.

Nothing but NumPy and SciPy is needed: the search side stays free of torch.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.archive import hypervolume, non_dominated_mask
from evomerge.core import VectorGenome, random_stream
from evomerge.strategy.base import Proposal, StrategyOptions, Told, candidate_id
from evomerge.strategy.gaussian_process import Floats, GaussianProcess, Hyperparameters
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.sampling import SobolStream

_STEPS = (0.2, 0.1, 0.05, 0.02, 0.005)
_POOL = 384
_FRONT = 96
_CLOSE = 1e-4
"""Proposals nearer than this (per root dimension) to a known point are worth no evaluation."""


class BoOptions(StrategyOptions):
    """Options of `bo`."""

    n_initial: int | None = Field(
        None, ge=2, description="points of the first Sobol design, seeds included; None: 2 d + 2, at most 40"
    )
    n_draws: int = Field(16, ge=1, le=256, description="joint posterior draws that the acquisition is averaged over")
    max_points: int = Field(
        400,
        ge=20,
        description="results that the models see: the front and the latest; the fit is cubic in their number",
    )
    item_noise: bool = Field(True, description="take the evaluations' standard errors as known observation noise")


class BayesianOptimisation(ReplayStrategy):
    """Gaussian processes with noisy expected (hypervolume) improvement.

    FAILED and INFEASIBLE candidates are left out of the models and never proposed again. Seeds are part of the design.
    Hyperparameters are fitted anew while results are few, then whenever their number has grown by a tenth.
    """

    name: ClassVar[str] = "bo"
    options_type: ClassVar[type[StrategyOptions]] = BoOptions
    options: BoOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_initial = self.options.n_initial or min(2 * self.dimension + 2, 40)
        self._design = SobolStream(self.dimension, random_stream(self.random_seed, "bo", "design"))
        self._finished: list[Told] = []
        self._open: dict[str, tuple[float, ...]] = {}
        self._failed: list[tuple[float, ...]] = []
        self._n_refined = 0
        self._n_fitted = 0
        self._hyperparameters: list[Hyperparameters | None] = [None] * len(self.objectives)

    def _propose(self) -> Proposal:
        if len(self._finished) + len(self._open) < self._n_initial or len(self._finished) < 2:
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
            self._finished.append(told)

    def _visible(self) -> tuple[Floats, Floats, Floats]:
        """Points, losses and known variances that the models see."""
        losses = np.array([told.losses for told in self._finished])
        rows = np.arange(len(losses))
        if len(rows) > self.options.max_points:
            front = np.flatnonzero(non_dominated_mask(losses))[: self.options.max_points // 2]
            latest = np.setdiff1d(rows, front)[-(self.options.max_points - len(front)) :]
            rows = np.sort(np.concatenate([front, latest]))
        points = np.array([self._finished[row].candidate.point for row in rows])
        variances = np.array([self._finished[row].stderr for row in rows], dtype=np.float64) ** 2
        return points, losses[rows], variances if self.options.item_noise else np.zeros_like(variances)

    def _models(self, points: Floats, losses: Floats, variances: Floats) -> list[GaussianProcess]:
        fit = len(losses) < 30 or len(self._finished) >= 1.1 * self._n_fitted
        models = []
        for column, start in enumerate(self._hyperparameters):
            model = GaussianProcess(points, losses[:, column], variances[:, column], start, fit or start is None)
            self._hyperparameters[column] = model.hyperparameters
            models.append(model)
        if fit:
            self._n_fitted = len(self._finished)
        return models

    def _refine(self) -> tuple[float, ...]:
        self._n_refined += 1
        generator = random_stream(self.random_seed, "bo", "refine", self._n_refined)
        points, losses, variances = self._visible()
        models = self._models(points, losses, variances)
        best = points[non_dominated_mask(losses)][:_FRONT]
        pool = self._pool(models, best, generator)
        anchors = np.vstack([best, *[np.array([values]) for values in self._open.values()]])
        everywhere = np.vstack([anchors, pool])
        normals = generator.standard_normal((len(models), self.options.n_draws, len(everywhere)))
        draws = np.stack([model.sample(everywhere, z) for model, z in zip(models, normals, strict=True)], axis=2)
        expected = np.column_stack([model.posterior(pool)[0] for model in models])
        gains = self._gains(draws[:, : len(anchors)], draws[:, len(anchors) :], expected)
        taken = np.vstack([points, *[np.array([values]) for values in (*self._open.values(), *self._failed)]])
        distance = np.sqrt(((pool[:, None, :] - taken[None]) ** 2).sum(axis=2)).min(axis=1)
        gains[distance < _CLOSE * np.sqrt(self.dimension)] = -1.0
        choice = int(np.argmax(gains)) if gains.max() > 0.0 else int(np.argmax(distance))
        return tuple(pool[choice].tolist())

    def _gains(self, known: Floats, pool: Floats, expected: Floats) -> Floats:
        """Improvement (k,) of each pool point, averaged over draws.

        `known` (s, a, m) and `pool` (s, k, m) are drawn losses, `expected` (k, m) the pool's mean losses.
        """
        total = np.zeros(pool.shape[1])
        # what lies beyond the front that the models expect is worth nothing: the evaluated front reaches far too wide at first
        front = expected[non_dominated_mask(expected)]
        worst, spread = front.max(axis=0), np.ptp(front, axis=0)
        reference = worst + 0.1 * np.where(spread > 0.0, spread, 1.0)
        for drawn_known, drawn_pool in zip(known, pool, strict=True):
            front = drawn_known[non_dominated_mask(drawn_known)]
            if pool.shape[2] == 1:
                total += np.maximum(front.min() - drawn_pool[:, 0], 0.0)
                continue
            front = front[(front < reference).all(axis=1)]
            volume = hypervolume(front, reference)
            beaten = (front[None] <= drawn_pool[:, None]).all(axis=2).any(axis=1) | (drawn_pool >= reference).any(
                axis=1
            )
            for row in np.flatnonzero(~beaten):
                total[row] += hypervolume(np.vstack([front, drawn_pool[row]]), reference) - volume
        return total / len(known)

    def _pool(self, models: list[GaussianProcess], best: Floats, generator: np.random.Generator) -> Floats:
        """Points to choose from: widening then narrowing perturbations of what is optimistic under the models."""
        pool = np.vstack([best, generator.random((_POOL, self.dimension))])
        for step in _STEPS:
            keep = self._optimistic(models, pool, generator.random())
            moved = keep[generator.integers(len(keep), size=_POOL)]
            mask = generator.random(moved.shape) < max(0.25, 1.0 / self.dimension)
            moved = np.clip(moved + step * mask * generator.standard_normal(moved.shape), 0.0, 1.0)
            pool = np.vstack([keep, moved])
        kept = self._optimistic(models, pool, 0.5)
        return np.vstack([kept, self._optimistic(models, pool, 0.0), pool[-_POOL // 4 :]])

    def _optimistic(self, models: list[GaussianProcess], pool: Floats, boldness: float) -> Floats:
        """The part of `pool` that is best at mean minus `boldness` standard deviations: the front, or the lowest losses."""
        bounds = []
        for model in models:
            mean, deviation = model.posterior(pool)
            bounds.append(mean - boldness * deviation)
        losses = np.column_stack(bounds)
        if losses.shape[1] == 1:
            return pool[np.argsort(losses[:, 0], kind="stable")[: _FRONT // 4]]
        rows = np.flatnonzero(non_dominated_mask(losses))
        if len(rows) > _FRONT:
            order = rows[np.argsort(losses[rows, 0], kind="stable")]
            rows = order[np.linspace(0, len(order) - 1, _FRONT).round().astype(int)]
        return pool[rows]
