"""`cma_es`: covariance matrix adaptation (pycma; Hansen, arXiv 1604.00772), asynchronous, with its own restarts.

It samples the current distribution whenever it is asked, so workers never wait for a generation; the distribution is updated
whenever `population_size` results are in, whatever generation they come from. A late result keeps its own sample (pycma
stores the genotype); its step is clipped in Mahalanobis length as for injected solutions (Hansen, arXiv 1110.4181).
Only the variant `vkd` works in strict generations, because its two-point step-size rule needs its mirrored pair.

In few dimensions a quadratic model of the results saves evaluations (`surrogate`, see `cma_surrogate_run`): on the 24 BBOB
functions it hits about twice as many targets as plain CMA-ES within 25 to 100 evaluations per dimension.

Coordinates of one family (a parameter in several layer and module groups) start with correlated steps, and the model learns their mean
before their individual effects (docs/adr/0014).

Bounds: pycma's `BoundTransform`, a smooth fold of each coordinate into [0, 1]. Unlike `BoundPenalty` it needs no
statistics of a whole generation, so it suits results that arrive one by one, and every proposal is within the bounds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from evomerge.core import Candidate, ConfigError, Genome, Json, VectorGenome, random_stream
from evomerge.strategy.base import Floats, Proposal, StrategyOptions, Told, nearly_equal
from evomerge.strategy.cma_run import CmaRun, Variant
from evomerge.strategy.cma_surrogate_run import SurrogateRun
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.sampling import family_correlation

_MAX_DOUBLINGS = 9
"""IPOP and BIPOP stop doubling here: nine restarts as in Hansen (2009), 10.1145/1570256.1570333."""

_MAX_KNOWN = 100
"""Within this many samples, a run that has converged on known points has restarted."""

MAX_FULL_DIMENSION = 24
"""325 coefficients: a larger full quadratic cannot be learned within the intended budgets, and slows every ask."""
MAX_DIAGONAL_DIMENSION = 60
"""Measured up to this dimension; with 100, under noise, plain CMA-ES was as good or better."""

FREE_DIFFERENCES = 8
"""In the first steps, the differences within families together have the variance of this many unrelated coordinates: each of n differences
has 8 / n of a coordinate's variance. With less, optima that are unrelated within a family are found late; with more, the families' levels are.
Measured from 12 to 60 dimensions."""
MIN_GROUPED_DIMENSION = 13
"""In 12 dimensions the model already knows every coordinate's effect as soon as it becomes useful."""

Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class CmaEsOptions(StrategyOptions):
    """Options of `cma_es`."""

    population_size: int | None = Field(
        None, ge=3, description="results per update; None: 4 + floor(3 ln d) (Hansen, arXiv 1604.00772)"
    )
    sigma0: float = Field(
        0.17,
        gt=0.0,
        le=1.0,
        description="first step size in unit coordinates; 1/6 of the range as in Optuna, used by arXiv 2403.13187",
    )
    variant: Variant = Field(
        "full",
        description="full: d x d covariance; sep: diagonal, for hundreds of dimensions; vkd: diagonal plus low rank",
    )
    surrogate: Literal["auto", "none", "diagonal", "quadratic"] = Field(
        "auto",
        description="quadratic: a model of the results saves evaluations (lq-CMA-ES, 10.1145/3321707.3321842), variant full only; "
        "diagonal: the same without products of two coordinates; "
        f"auto: quadratic up to {MAX_FULL_DIMENSION} dimensions, diagonal up to {MAX_DIAGONAL_DIMENSION}, else none",
    )
    group_correlation: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="correlation of the first steps of a parameter's values in several layer and module groups; the model learns their level "
        "before their differences; variant full only; 0: unrelated; "
        f"None: 1 - {FREE_DIFFERENCES} / (coordinates - levels) from {MIN_GROUPED_DIMENSION} coordinates on, not below 0",
    )
    start: Literal["best", "centre"] | tuple[Unit, ...] = Field(
        "best",
        description="first mean: the best seed point (the centre if there is none), the centre, or a given point",
    )
    restarts: Literal["none", "ipop", "bipop"] = Field(
        "ipop",
        description="after convergence: restart with doubled population (ipop, 10.1109/CEC.2005.1554902) or in two regimes "
        "(bipop, 10.1145/1570256.1570333), or stop the search (none)",
    )
    item_noise: bool = Field(
        False,
        description="raise the step size while, according to the evaluations' standard errors, the order of results is largely "
        "random (the rule of UH-CMA-ES, 10.1109/TEVC.2008.924423)",
    )


class CmaEs(ReplayStrategy):
    """CMA-ES on one objective, or on the weighted mean of several losses.

    FAILED and INFEASIBLE candidates rank last among the results of their update (the worst loss plus the batch's range);
    a batch in which every candidate failed is skipped, and the distribution stays. Results from before a restart only
    affect `recommend`. Seeds set the first mean (`start`), are known to the surrogate and are considered by `recommend`.
    """

    name: ClassVar[str] = "cma_es"
    options_type: ClassVar[type[StrategyOptions]] = CmaEsOptions
    uses_families: ClassVar[bool] = True
    averages: ClassVar[bool] = True
    options: CmaEsOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_known = 0 if self.options.variant == "vkd" else _MAX_KNOWN
        if isinstance(self.options.start, tuple) and len(self.options.start) != self.dimension:
            raise ConfigError(
                f"strategy cma_es: start has {len(self.options.start)} coordinates, but the space has {self.dimension}"
            )
        self._base_population = self.options.population_size or 4 + math.floor(3 * math.log(self.dimension))
        self._run: CmaRun | SurrogateRun | None = None
        self._origin: dict[str, tuple[int, int]] = {}
        self._n_runs = 0
        self._doublings = 0
        self._spent = {"large": 0, "small": 0}
        self._regime: Literal["large", "small"] = "large"
        self._surrogate = self._chosen_surrogate()
        self._correlation = self._chosen_correlation()
        self._groups = self.families if self._correlation > 0.0 else None
        self._known: list[tuple[tuple[float, ...], float]] = []
        self._real = np.array(self.choices) == 0
        self._unsettled = False

    def stop_reasons(self) -> Mapping[str, Json]:
        """pycma's termination reasons if there are no restarts; `restarts` when the last doubling has converged; and `space`, as in all strategies."""
        self._settle()
        reasons = {} if self._run is None else self._run.stop_reasons()
        if reasons and self.options.restarts != "none":
            reasons = {"restarts": self._n_runs} if self._exhausted() else {}
        return {**super().stop_reasons(), **reasons}

    def _propose(self) -> Proposal | None:
        self._settle()
        if self._run is None:
            self._run = self._first_run()
        sample = self._run.sample()
        if sample is None:
            return None
        number, point = sample
        self._origin[self._next_id] = (self._n_runs, number)
        return Proposal(VectorGenome(point))

    def _recall(self, was: Callable[[Genome], bool]) -> Proposal | None:
        # if coordinates can be without effect, any sample may repeat a known point, which is answered instead of asked
        if self._conditions or not isinstance(self._run, SurrogateRun):
            return None
        sample = self._run.recall(lambda point: was(VectorGenome(point)), self._real)
        if sample is None:
            return None
        self._origin[self._next_id] = (self._n_runs, sample[0])
        return Proposal(VectorGenome(sample[1]))

    def _withdraw(self) -> bool:
        # with real coordinates only samples in a corner repeat, rarely, and rejecting them drove the search away from the corner
        if self._run is None or not self._n_points:
            return False
        self._run.withdraw(self._origin.pop(self._next_id)[1])
        return True

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:
        if self._run is not None and proposed is not None and not nearly_equal(recorded.genome, proposed):
            self._run.adopt(self._origin[recorded.id][1], recorded.point)

    def _start(self, seeds: Sequence[Told]) -> None:
        for told in seeds:
            loss = self._mean_loss.of(told)
            if loss is not None:
                self._known.append((told.candidate.point, loss))

    def _learn(self, told: Told) -> None:
        self._settle()
        loss = self._mean_loss.of(told)
        run, number = self._origin.pop(told.candidate.id, (0, 0))
        if self._run is None or run != self._n_runs:
            return
        self._spent[self._regime] += 1
        known = self.options.item_noise and told.stderr
        noise = float(np.linalg.norm(self._mean_loss.weights * np.array(told.stderr))) if known else 0.0
        self._run.tell(number, loss, noise)
        self._unsettled = True

    def _settle(self) -> None:
        """Restart if the run has converged with the last result. Done lazily, because a replay can often skip the check."""
        if not self._unsettled or self._run is None:
            return
        self._unsettled = False
        if self.options.restarts != "none" and self._run.stop_reasons() and not self._exhausted():
            self._restart()

    def _chosen_surrogate(self) -> Literal["none", "diagonal", "quadratic"]:
        wanted, variant = self.options.surrogate, self.options.variant
        if wanted == "auto":
            if variant != "full" or self.dimension > MAX_DIAGONAL_DIMENSION:
                return "none"
            return "quadratic" if self.dimension <= MAX_FULL_DIMENSION else "diagonal"
        if wanted != "none" and variant != "full":
            raise ConfigError(
                f"strategy cma_es: surrogate {wanted} needs variant full, got {variant}; leave one of them out"
            )
        return wanted

    def _chosen_correlation(self) -> float:
        wanted = self.options.group_correlation
        if self.families is None or self.options.variant != "full":
            return 0.0
        if wanted is not None:
            return wanted
        n_differences = self.dimension - len(set(self.families))
        return max(0.0, 1.0 - FREE_DIFFERENCES / n_differences) if self.dimension >= MIN_GROUPED_DIMENSION else 0.0

    def _first_run(self) -> CmaRun | SurrogateRun:
        self._n_runs = 1
        best = self._mean_loss.best()
        if isinstance(self.options.start, tuple):
            mean = np.array(self.options.start)
        elif self.options.start == "best" and best is not None:
            mean = np.array(best.point)
        else:
            mean = np.full(self.dimension, 0.5)
        return self._new_run(mean, self.options.sigma0, self._base_population)

    def _new_run(self, mean: Floats, sigma: float, population_size: int) -> CmaRun | SurrogateRun:
        generator = random_stream(self.random_seed, "cma_es", "run", self._n_runs)
        correlation = None if self._groups is None else family_correlation(self._groups, self._correlation)
        if self._surrogate != "none":
            full = self._surrogate == "quadratic"
            return SurrogateRun(
                mean,
                sigma,
                population_size,
                generator,
                self._known,
                full=full,
                families=self._groups,
                correlation=correlation,
            )
        return CmaRun(mean, sigma, population_size, self.options.variant, generator, correlation)

    def _exhausted(self) -> bool:
        return self._doublings >= _MAX_DOUBLINGS and self._regime == "large"

    def _restart(self) -> None:
        """Start the next run at a uniform point: IPOP (10.1109/CEC.2005.1554902) or BIPOP (10.1145/1570256.1570333)."""
        self._n_runs += 1
        generator = random_stream(self.random_seed, "cma_es", "restart", self._n_runs)
        mean = generator.random(self.dimension)
        sigma, population = self.options.sigma0, self._base_population * 2 ** (self._doublings + 1)
        small = self.options.restarts == "bipop" and self._spent["small"] < self._spent["large"] and self._doublings > 0
        if small or self._doublings >= _MAX_DOUBLINGS:
            self._regime = "small"
            largest = self._base_population * 2**self._doublings
            exponent = generator.random() ** 2
            population = math.floor(self._base_population * (0.5 * largest / self._base_population) ** exponent)
            sigma = max(self.options.sigma0 * 10.0 ** (-2.0 * generator.random()), 1e-3)
        else:
            self._regime = "large"
            self._doublings += 1
        self._run = self._new_run(mean, sigma, max(population, 3))
