"""`catcma`: CatCMA with margin (arXiv 2504.07884) on mixed real and categorical coordinates, implemented by the library `cmaes`.

Real coordinates have CMA-ES's normal distribution, categorical ones a probability for every choice; each update changes both. A
margin keeps every choice possible. Like `cma_es`, it samples the current distribution whenever it is asked and updates whenever
`population_size` results are in, whatever generation they come from.

When the normal distribution has converged or diverged, as it does if every candidate scores the same, a new one with twice the population starts
at a random point (as IPOP does for `cma_es`, 10.1109/CEC.2005.1554902).
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from cmaes import CatCMAwM
from numpy.typing import NDArray
from pydantic import Field

from evomerge.core import Candidate, Genome, VectorGenome, random_stream
from evomerge.space import choices_at, middles_of
from evomerge.strategy.base import Proposal, StrategyOptions, Told, nearly_equal
from evomerge.strategy.mean_loss import behind_all
from evomerge.strategy.replay import ReplayStrategy

_MAX_DOUBLINGS = 9
"""Restarts stop doubling the population here, as in `cma_es`."""


class CatCmaOptions(StrategyOptions):
    """Options of `catcma`."""

    population_size: int | None = Field(
        None, ge=4, description="results per update; None: 4 + floor(3 ln d), as CMA-ES (arXiv 1604.00772)"
    )
    sigma0: float = Field(
        0.17, gt=0.0, le=1.0, description="first step size of real coordinates; 1/6 of the range (arXiv 2403.13187)"
    )
    start: Literal["best", "centre"] = Field(
        "best",
        description="first distribution: centred on the best seed point, or on the centre with uniform probabilities",
    )
    start_probability: float = Field(
        0.7,
        gt=0.0,
        lt=1.0,
        description="probability of the seed's choice in each categorical coordinate, with start: best; the rest is spread evenly (ours)",
    )


class CatCma(ReplayStrategy):
    """CatCMAwM on one objective or the mean of several losses.

    FAILED and INFEASIBLE candidates rank last in their update (the worst loss plus the range); an update in which all failed is
    skipped. Results from before a restart only affect `recommend`. Seeds set the first distribution (`start`) and are considered by `recommend`.
    """

    name: ClassVar[str] = "catcma"
    options_type: ClassVar[type[StrategyOptions]] = CatCmaOptions
    averages: ClassVar[bool] = True
    max_known = 100
    options: CatCmaOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._real = np.flatnonzero(np.array(self.choices) == 0)
        self._optimizer: CatCMAwM | None = None
        self._n_runs = 0
        self._base_population = 0
        self._solutions: dict[str, tuple[int, CatCMAwM.Solution]] = {}
        self._finished: list[tuple[CatCMAwM.Solution, float | None]] = []

    def _start(self, seeds: Sequence[Told]) -> None:
        """Nothing to do: only the best seed matters, and `_mean_loss` knows it."""

    def _propose(self) -> Proposal:
        if self._optimizer is None:
            self._optimizer = self._next_run()
        solution = self._optimizer.ask()
        point = np.empty(self.dimension)
        if len(self._real):
            point[self._real] = np.clip(solution.x, 0.0, 1.0)
        if len(self._discrete):
            point[self._discrete] = middles_of(np.argmax(solution.c, axis=1), self._counts)
        self._solutions[self._next_id] = self._n_runs, solution
        return Proposal(VectorGenome(tuple(point.tolist())))

    def _withdraw(self) -> bool:
        return True

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:
        if nearly_equal(recorded.genome, proposed):
            return
        point = np.array(recorded.point)
        real = point[self._real] if len(self._real) else None
        chosen = None
        if len(self._discrete):
            choice = choices_at(point[self._discrete], self._counts)
            chosen = (np.arange(self._counts.max()) == choice[:, None]).astype(bool)
        self._solutions[recorded.id] = self._n_runs, CatCMAwM.Solution(real, None, chosen, real)

    def _learn(self, told: Told) -> None:
        run, solution = self._solutions.pop(told.candidate.id)
        if run != self._n_runs or self._optimizer is None:
            return
        self._finished.append((solution, self._mean_loss.of(told)))
        if len(self._finished) < self._optimizer.population_size:
            return
        known = [loss for _, loss in self._finished if loss is not None]
        if known:
            last = behind_all(known)
            # if the first results are all equal, its penalty is the median of an empty list and has no effect
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                self._optimizer.tell([(solution, last if loss is None else loss) for solution, loss in self._finished])
            if len(self._real) and self._optimizer.should_stop():
                self._optimizer = None
        self._finished = []

    def _next_run(self) -> CatCMAwM:
        """The first optimiser, centred on the best seed or not on any point, as `start` says; later ones on random points, with no preferred choices."""
        self._n_runs += 1
        if self._n_runs > 1:
            generator = random_stream(self.random_seed, self.name, "restart", self._n_runs)
            size = self._base_population * 2 ** min(self._n_runs - 1, _MAX_DOUBLINGS)
            return self._new_run(generator, generator.random(len(self._real)), None, size)
        best = self._mean_loss.best() if self.options.start == "best" else None
        point = None if best is None else np.array(best.point)
        mean = np.full(len(self._real), 0.5) if point is None else point[self._real].copy()
        first = self._new_run(random_stream(self.random_seed, self.name), mean, point, self.options.population_size)
        self._base_population = first.population_size
        return first

    def _new_run(
        self,
        generator: np.random.Generator,
        mean: NDArray[np.float64],
        point: NDArray[np.float64] | None,
        population_size: int | None,
    ) -> CatCMAwM:
        """An optimiser with this mean of the real coordinates, and a preference for the choices at `point` (None: for none)."""
        n_real = len(self._real)
        real: dict[str, Any] = {}
        if n_real:
            real = {
                "x_space": [[0.0, 1.0]] * n_real,
                "mean": mean,
                "sigma": self.options.sigma0,
                "cov": np.eye(n_real),
            }
        return CatCMAwM(
            **real,
            c_space=self._counts.tolist() or None,
            cat_param=self._probabilities(point) if len(self._discrete) else None,
            population_size=population_size,
            seed=int(generator.integers(2**32)),
        )

    def _probabilities(self, point: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """(n_categorical, max_choices): initial probability of each choice; 0 beyond a coordinate's last choice."""
        rows = np.arange(len(self._counts))
        table = np.where(np.arange(self._counts.max()) < self._counts[:, None], 1.0 / self._counts[:, None], 0.0)
        if point is None:
            return table
        chosen = choices_at(point[self._discrete], self._counts).astype(int)
        table *= (1.0 - self.options.start_probability) / (1.0 - 1.0 / self._counts[:, None])
        table[rows, chosen] = self.options.start_probability
        return table
