"""`bo`: Bayesian optimisation with BoTorch's Gaussian processes, for tens to a few hundred expensive evaluations.

One objective: noisy expected improvement (qLogNEI, arXiv 2310.20708); several: noisy expected hypervolume improvement
(qLogNEHVI, arXiv 2105.08195). Both are used in their logarithmic form, for one point at a time conditioned on the pending ones, so that
any number of workers can be busy. Every objective has its own process, with BoTorch's length-scale prior that grows with
the dimension (arXiv 2402.02229).

This is the only module of the search side that imports torch: only when this strategy is chosen, and only on the CPU.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction, PosteriorMean
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.utils import prune_inferior_points_multi_objective
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.exceptions import ModelFittingError
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import gen_batch_initial_conditions, optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import MaternKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from pydantic import Field, field_validator

from evomerge.archive import non_dominated_mask
from evomerge.core import Candidate, ConfigError, Genome, VectorGenome, random_stream
from evomerge.space import placed
from evomerge.strategy.base import Floats, Proposal, StrategyOptions, Told
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.ruin import tamed
from evomerge.strategy.sampling import SobolStream, next_to
from evomerge.strategy.trust_region import TrustRegion, centre_of

logger = logging.getLogger(__name__)

MAX_OBJECTIVES = 4
"""Decomposing the space above a front into boxes takes seconds with five objectives, and minutes with more."""

TRUST_REGION_DIMENSION = 30

_FIT_ITERATIONS = 100
_LOOK_BEYOND = 4
_OTHERS_WEIGHT = 0.1
_PRUNE_SAMPLES = 128
"""Number of posterior draws; the acquisition ignores results that are not on the front in any of them. BoTorch draws 2048."""
_EXACT = 1e-4
"""Noise variance, relative to its own variance, of an objective without standard errors if another objective has them."""
_LOG_NOISE = (-8.0, 2.0)
"""Mean and standard deviation of the prior on the log noise variance of a standardised loss."""
_LEAST_NOISE = 1e-6
_LEAST_LENGTH = 0.025

_CLOSE = 1e-4
"""Proposals closer than this (times the square root of the dimension) to a known point are not worth an evaluation."""

_USUAL = 0.01, 100.0
"""Range of standard deviations in which losses keep their unit; outside it they are scaled to 1. When all were scaled, DTLZ2 with three objectives had 0.58 of its hypervolume after 200 evaluations instead of 0.76."""

_ROUNDING = 1e-9
"""Losses that differ by less than this fraction of the largest count as equal: means of the same scores in a different order differ by rounding."""

_N_CHOICES = 256
"""Number of candidate points with other choices than the optimum's."""
_REDRAWN = 0.3
"""Fraction of the choices that is redrawn in three quarters of these points."""

Parameters = list[torch.Tensor]

# If it finds a compiler, BoTorch would compile a kernel for this particular CPU: proposals could then round differently elsewhere,
# so that a run could not be resumed. Also, a process killed during compilation would leave its lock behind.
logei._load_attempted = True


class BoOptions(StrategyOptions):
    """Options of `bo`."""

    n_initial: int | None = Field(
        None, ge=2, description="points of the first Sobol design, seeds included; None: 2 d + 2, at most 40"
    )
    n_samples: int = Field(
        16, ge=1, le=1024, description="quasi-random posterior draws that the acquisition is averaged over"
    )
    n_restarts: int = Field(2, ge=1, description="local searches for the acquisition's maximum")
    n_raw: int = Field(64, ge=1, description="points of which the best are the starts of these searches")
    max_iterations: int = Field(50, ge=1, description="steps of each local search (L-BFGS-B)")
    max_points: int = Field(
        400,
        ge=20,
        description="maximum number of results used by the models: the front and the latest; the fit is cubic in their number",
    )
    refit_growth: float = Field(
        1.1,
        ge=1.0,
        allow_inf_nan=False,
        description="hyperparameters are refitted when the number of results has grown by this factor since the last fit",
    )
    item_noise: bool = Field(True, description="take the evaluations' standard errors as known observation noise")
    trust_region: Literal["auto", "on", "off"] = Field(
        "auto",
        description="search only in a box around the best point that moves and shrinks (TuRBO, arXiv 1910.01739); "
        f"auto: from {TRUST_REGION_DIMENSION} dimensions on",
    )

    @field_validator("trust_region", mode="before")
    @classmethod
    def _as_written(cls, value: object) -> object:
        """YAML reads on and off as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class BayesianOptimisation(ReplayStrategy):
    """Gaussian processes with noisy expected (hypervolume) improvement.

    FAILED and INFEASIBLE candidates enter the models with the worst losses seen, which keeps the search away from their
    neighbourhood. Seeds are part of the design.

    Noise: if evaluations have standard errors, their squares are the observation noise; a standard error of 0, which results
    when all items agree, is replaced by the smallest positive one. Without standard errors the noise is fitted; an objective
    without any counts as exact if another objective has them.

    Torch runs on one thread with a separately seeded generator, so proposals depend neither on the caller's number of threads
    nor on its generator. Resuming replays the proposals, so it takes as long as they took.
    """

    name: ClassVar[str] = "bo"
    options_type: ClassVar[type[StrategyOptions]] = BoOptions
    options: BoOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.objectives) > MAX_OBJECTIVES:
            raise ConfigError(
                f"strategy bo takes at most {MAX_OBJECTIVES} objectives, got {len(self.objectives)}; use map, or bo on fewer"
            )
        self._choice_counts = np.array(self.choices)
        self._cube = np.stack([np.zeros(self.dimension), np.ones(self.dimension)])
        self._n_initial = self.options.n_initial or min(2 * self.dimension + 2, 40)
        self._design = SobolStream(self.dimension, random_stream(self.random_seed, "bo", "design"))
        self._finished: list[Told] = []
        self._failed: list[tuple[float, ...]] = []
        self._open: dict[str, tuple[float, ...]] = {}
        self._refined: set[str] = set()
        self._n_refined = 0
        self._first = 0
        """index of the first result of the current trust region"""
        self._region = self._make_region()
        self._fitted: tuple[int, Parameters] | None = None
        """number of results at the last fit, and its hyperparameters"""
        self._beyond: Floats | None = None
        """(m,) losses: the hypervolume's reference point, kept for `_LOOK_BEYOND` proposals"""

    def _propose(self) -> Proposal:
        identifier = self._next_id
        n_finished = len(self._finished) - self._first
        if n_finished + len(self._open) < self._n_initial or n_finished < 2:
            values = self._design.next().values
        else:
            values = self._refine()
            self._refined.add(identifier)
        values = tuple(placed(np.array(values), self._choice_counts).tolist())
        self._open[identifier] = values
        return self._unknown_instead(Proposal(VectorGenome(values)))

    def _learn(self, told: Told) -> None:
        self._open.pop(told.candidate.id, None)
        refined = told.candidate.id in self._refined
        self._refined.discard(told.candidate.id)
        if self._region is not None and refined:
            self._region.learn(told.losses is not None and self._improves(told.losses))
        if told.losses is None:
            self._failed.append(told.candidate.point)
        else:
            self._finished.append(told)
        if self._region is not None and self._region.exhausted:
            self._region, self._first, self._fitted = self._make_region(), len(self._finished), None
            self._refined.clear()

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:
        self._open[recorded.id] = recorded.point

    def _make_region(self) -> TrustRegion | None:
        wanted = self.options.trust_region
        if wanted == "on" or (wanted == "auto" and self.dimension >= TRUST_REGION_DIMENSION):
            return TrustRegion(self.dimension)
        return None

    def _improves(self, losses: Sequence[float]) -> bool:
        known = np.array([told.losses for told in self._finished[self._first :]])
        return not bool((known <= np.array(losses)).all(axis=1).any())

    def _visible(self) -> tuple[Floats, Floats, Floats]:
        """Points (n, d), losses (n, m) and noise variances (n, m; 0.0 if unknown) that the models use."""
        results = self._finished[self._first :]
        losses = tamed(np.array([told.losses for told in results]), self._n_initial)
        rows = np.arange(len(losses))
        if len(rows) > self.options.max_points:
            front = np.flatnonzero(non_dominated_mask(losses))[: self.options.max_points // 2]
            latest = np.setdiff1d(rows, front)[-(self.options.max_points - len(front)) :]
            rows = np.sort(np.concatenate([front, latest]))
        points = placed(np.array([results[row].candidate.point for row in rows]), self._choice_counts)
        variances = np.array([results[row].stderr for row in rows], dtype=np.float64) ** 2
        return points, losses[rows], variances if self.options.item_noise else np.zeros_like(variances)

    def _refine(self) -> tuple[float, ...]:
        """The acquisition's maximum, or the design's next point if that is too close to a known point."""
        self._n_refined += 1
        seed = int(random_stream(self.random_seed, "bo", "refine", self._n_refined).integers(2**31))
        points, losses, variances = self._visible()
        taken = np.array([*points, *self._open.values(), *self._failed])
        # acquisitions smooth over fixed lengths, which are too long for small losses and overflow for large ones
        spread = np.maximum(losses.std(axis=0), _ROUNDING * np.abs(losses).max(axis=0))
        is_usual = (_USUAL[0] < spread) & (spread < _USUAL[1])
        scale = np.where(is_usual | (spread == 0.0), 1.0, spread)
        losses = losses / scale
        with _quiet_torch(seed):
            model = self._model(points, losses, variances / scale**2)
            acquisition = self._acquisition(model, points, losses, scale, seed)
            bounds = self._cube
            if self._region is not None:
                lengths = model.covar_module.lengthscale.detach().numpy().reshape(-1, self.dimension)
                bounds = self._region.box(centre_of(points, losses), np.exp(np.log(lengths).mean(axis=0)))
            best = np.clip(self._optimum(acquisition, bounds, seed).numpy(), 0.0, 1.0)
            if len(self._discrete):
                best = self._among_choices(acquisition, best, points[non_dominated_mask(losses)], taken)
        if next_to(best[None], taken, _CLOSE)[0]:
            return self._design.next().values
        return tuple(best.tolist())

    def _among_choices(self, acquisition: AcquisitionFunction, best: Floats, front: Floats, taken: Floats) -> Floats:
        """The point (d,) with the highest acquisition value in a pool of points that are not `taken` (t, d).

        The pool contains `best`, the optimum with choices treated as real numbers, with its coordinates moved to choices; variants of it and of the
        `front` (f, d) with some choices redrawn; and variants with all choices redrawn.
        """
        draw = random_stream(self.random_seed, "bo", "choices", self._n_refined)
        around = np.vstack([best, front])
        pool = around[draw.integers(len(around), size=_N_CHOICES)]
        share = np.where(np.arange(_N_CHOICES) % 4 == 0, 1.0, max(_REDRAWN, 1.0 / len(self._discrete)))
        redrawn = (draw.random(pool.shape) < share[:, None]) & (self._choice_counts > 0)
        pool = placed(np.vstack([best, np.where(redrawn, draw.random(pool.shape), pool)]), self._choice_counts)
        pool = np.unique(pool[~next_to(pool, taken, _CLOSE)], axis=0)
        if len(pool) == 0:
            return placed(best, self._choice_counts)
        with torch.no_grad():
            return np.asarray(pool[int(acquisition(_tensor(pool)[:, None]).argmax())])

    def _model(self, points: Floats, losses: Floats, variances: Floats) -> SingleTaskGP:
        """A process of the negative loss for each objective, in one batch; hyperparameters are refitted when due."""
        failed = np.array(self._failed).reshape(-1, self.dimension)[-self.options.max_points // 4 :]
        everywhere = _tensor(np.vstack([points, failed]))
        values = np.vstack([losses, np.tile(losses.max(axis=0), (len(failed), 1))])
        batch = torch.Size([] if losses.shape[1] == 1 else [losses.shape[1]])
        yvar, likelihood = None, None
        if variances.any():
            known = np.vstack([variances, np.zeros((len(failed), losses.shape[1]))])
            least = np.where(known > 0.0, known, np.inf).min(axis=0)
            least = np.where(np.isfinite(least), least, _EXACT * values.var(axis=0))
            yvar = _tensor(np.where(known > 0.0, known, least))
        else:
            likelihood = _inferred_noise(batch)
        model = SingleTaskGP(everywhere, _tensor(-values), yvar, likelihood, _kernel(self.dimension, batch))
        n_results = len(self._finished) - self._first
        if self._fitted is None or n_results >= self.options.refit_growth * self._fitted[0] or not self._load(model):
            _fit(model)
            self._fitted = (n_results, [value.detach().clone() for value in model.parameters()])
        return model

    def _load(self, model: SingleTaskGP) -> bool:
        """Set the model's hyperparameters to those of the last fit; False if that had another noise model."""
        parameters, saved = list(model.parameters()), [] if self._fitted is None else self._fitted[1]
        if len(parameters) != len(saved):
            return False
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
        return True

    def _acquisition(
        self, model: SingleTaskGP, points: Floats, losses: Floats, scale: Floats, seed: int
    ) -> AcquisitionFunction:
        """The acquisition function; `losses` are those of `points`, divided by `scale`."""
        baseline = _tensor(points)
        pending = _tensor(np.array(list(self._open.values()))) if self._open else None
        sampler = SobolQMCNormalSampler(torch.Size([self.options.n_samples]), seed=seed)
        if losses.shape[1] == 1:
            return qLogNoisyExpectedImprovement(model, baseline, sampler, X_pending=pending, prune_baseline=True)
        reference = self._reference(model, points, losses, scale, seed)
        baseline = prune_inferior_points_multi_objective(model, baseline, reference, num_samples=_PRUNE_SAMPLES)
        return qLogNoisyExpectedHypervolumeImprovement(model, reference, baseline, sampler, X_pending=pending)

    def _reference(self, model: SingleTaskGP, points: Floats, losses: Floats, scale: Floats, seed: int) -> torch.Tensor:
        """The hypervolume's reference point (m,), as negative losses in units of `scale`.

        For three proposals, a tenth beyond the ends of the front that the model expects, where one objective has ten times the weight of each
        other one; for every fourth, the worst losses seen. The front of the results is not suitable: it is far too wide at first, and
        once one result dominates the rest, points that would extend the front have no hypervolume.
        """
        if self._n_refined % _LOOK_BEYOND == 0:
            self._beyond = None
            return _tensor(-losses.max(axis=0))
        if self._beyond is None:
            self._beyond = -scale * self._beyond_the_ends(model, points, losses, seed).numpy()
        return _tensor(-self._beyond / scale)

    def _beyond_the_ends(self, model: SingleTaskGP, points: Floats, losses: Floats, seed: int) -> torch.Tensor:
        ends = []
        for goal in range(losses.shape[1]):
            weights = np.where(np.arange(losses.shape[1]) == goal, 1.0, _OTHERS_WEIGHT)
            expected = PosteriorMean(model, posterior_transform=ScalarizedPosteriorTransform(_tensor(weights)))
            expected.X_baseline = _tensor(points)
            ends.append(model.posterior(self._optimum(expected, self._cube, seed)[None]).mean[0].detach())
        nadir, ideal = torch.stack(ends).amin(dim=0), torch.stack(ends).amax(dim=0)
        return nadir - 0.1 * torch.where(ideal > nadir, ideal - nadir, 1.0)

    def _optimum(self, acquisition: AcquisitionFunction, bounds: Floats, seed: int) -> torch.Tensor:
        """The best point (d,) in `bounds` (2, d) that a few local searches find."""
        options = self.options
        found, _ = optimize_acqf(
            acquisition,
            _tensor(bounds),
            q=1,
            num_restarts=options.n_restarts,
            raw_samples=options.n_raw,
            options={"maxiter": options.max_iterations, "seed": seed, "sample_around_best": True},
            ic_generator=_starts_in_bounds,
        )
        best: torch.Tensor = found[0].detach()
        return best


def _tensor(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))


def _starts_in_bounds(*, bounds: torch.Tensor, **settings: Any) -> torch.Tensor:
    """BoTorch's starting points, clipped to `bounds`: from 20 dimensions on it keeps some coordinates of the best results unchanged."""
    starts: torch.Tensor = gen_batch_initial_conditions(bounds=bounds, **settings)
    return starts.clamp(bounds[0], bounds[1])


def _kernel(dimension: int, batch: torch.Size) -> MaternKernel:
    """Matern 5/2 with BoTorch's length-scale prior; BoTorch's default kernel is infinitely smooth and mistook the waves of ZDT3 for noise."""
    prior = LogNormalPrior(math.sqrt(2.0) + 0.5 * math.log(dimension), math.sqrt(3.0))
    constraint = GreaterThan(_LEAST_LENGTH, transform=None, initial_value=prior.mode)
    return MaternKernel(
        nu=2.5, ard_num_dims=dimension, batch_shape=batch, lengthscale_prior=prior, lengthscale_constraint=constraint
    )


def _inferred_noise(batch: torch.Size) -> GaussianLikelihood:
    """Likelihood with fitted noise; BoTorch's prior is meant for real experiments, but a merged model's score can be exact."""
    prior = LogNormalPrior(*_LOG_NOISE)
    constraint = GreaterThan(_LEAST_NOISE, transform=None, initial_value=prior.mode)
    return GaussianLikelihood(noise_prior=prior, noise_constraint=constraint, batch_shape=batch).double()


def _fit(model: SingleTaskGP) -> None:
    """Fit hyperparameters by maximum a posteriori; keep those of the prior if the optimiser fails."""
    try:
        fit_gpytorch_mll(
            ExactMarginalLogLikelihood(model.likelihood, model),
            optimizer_kwargs={"options": {"maxiter": _FIT_ITERATIONS}},
        )
    except ModelFittingError as error:
        logger.warning("bo: hyperparameters could not be fitted (%s); those of the prior are used", error)


@contextmanager
def _quiet_torch(seed: int) -> Iterator[None]:
    """Run torch with one thread, a seeded generator and no warnings; restore everything afterwards."""
    n_threads, state = torch.get_num_threads(), torch.default_generator.get_state()
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(seed)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.default_generator.set_state(state)
        torch.set_num_threads(n_threads)
