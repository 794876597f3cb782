"""`ga`, `nsga2`, `nsga3`, `sms_emoa`, `age_moea2`: steady-state Pareto searches with pymoo's survival rules."""

from collections.abc import Callable
from dataclasses import replace
from math import comb
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.age2 import AGEMOEA2Survival
from pymoo.algorithms.moo.nsga2 import binary_tournament
from pymoo.algorithms.moo.nsga3 import ReferenceDirectionSurvival
from pymoo.algorithms.moo.sms import LeastHypervolumeContributionSurvival, cv_and_dom_tournament
from pymoo.core.individual import Individual
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.util.ref_dirs import get_reference_directions

from evomerge.strategy.base import Told
from evomerge.strategy.pareto_evolution import ParetoEvolution

Tournament = Callable[..., NDArray[np.int_]]

_AGE_PRECISION = 1e-12
"""Precision to which pymoo's AGE-MOEA rounds losses."""


class Nsga2(ParetoEvolution):
    """NSGA-II (Deb et al. 2002, 10.1109/4235.996017): non-dominated rank, then crowding distance. Best with two objectives; takes any number."""

    name: ClassVar[str] = "nsga2"
    min_objectives: ClassVar[int] = 1
    tournament_type: ClassVar[str] = "comp_by_dom_and_crowding"

    def _tournament(self) -> Tournament:
        return binary_tournament  # type: ignore[no-any-return]

    def _make_survival(self) -> RankAndCrowding:
        return RankAndCrowding()


class Ga(Nsga2):
    """A steady-state genetic algorithm on one objective or the mean of several losses: the worst of the population is dropped.

    The reference for `catcma` on spaces with categorical coordinates, where crossover keeps choices on which the parents agree.
    """

    name: ClassVar[str] = "ga"
    averages: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._problem = Problem(n_var=self.dimension, n_obj=1, xl=0.0, xu=1.0)

    def _individual(self, told: Told) -> Individual:
        loss = self._mean_loss.of(told)
        return super()._individual(told if loss is None else replace(told, losses=(loss,)))


class Nsga3(ParetoEvolution):
    """NSGA-III (Deb and Jain 2014, 10.1109/TEVC.2013.2281535): niches along reference directions. Three or more objectives.

    The directions are Das and Dennis' simplex lattice, as fine as `population_size` allows.
    """

    name: ClassVar[str] = "nsga3"

    def _tournament(self) -> Tournament:
        return cv_and_dom_tournament  # type: ignore[no-any-return]

    def _make_survival(self) -> ReferenceDirectionSurvival:
        n_objectives = len(self.objectives)
        partitions = 1
        while comb(partitions + n_objectives, n_objectives - 1) <= self.options.population_size:
            partitions += 1
        return ReferenceDirectionSurvival(get_reference_directions("das-dennis", n_objectives, n_partitions=partitions))


class SmsEmoa(ParetoEvolution):
    """SMS-EMOA (Beume et al. 2007, 10.1016/j.ejor.2006.08.008): the member with the smallest exclusive hypervolume is dropped."""

    name: ClassVar[str] = "sms_emoa"

    def _tournament(self) -> Tournament:
        return cv_and_dom_tournament  # type: ignore[no-any-return]

    def _make_survival(self) -> LeastHypervolumeContributionSurvival:
        return LeastHypervolumeContributionSurvival()

    def _survive(self, population: Population) -> Population:
        # avoid a zero range in the normalisation for a single point or a constant objective
        losses = population.get("F")
        spread = losses.max(axis=0) - losses.min(axis=0)
        return self._survival.do(
            self._problem,
            population,
            n_survive=min(self.options.population_size, len(population)),
            ideal=losses.min(axis=0),
            nadir=losses.max(axis=0) + np.where(spread > 0.0, 0.0, 1.0),
            random_state=self._generator,
        )


class AgeMoea2(ParetoEvolution):
    """AGE-MOEA-II (Panichella 2022, 10.1145/3512290.3528732): spread and closeness measured along the front's own curvature."""

    name: ClassVar[str] = "age_moea2"

    def _tournament(self) -> Tournament:
        return binary_tournament  # type: ignore[no-any-return]

    def _make_survival(self) -> "_AgeSurvival":
        return _AgeSurvival()


class _AgeSurvival(AGEMOEA2Survival):  # type: ignore[misc]
    """pymoo's survival without its division by zero when equal members are best at every objective: such a front has no curvature."""

    def survival_score(
        self, front: NDArray[np.float64], ideal_point: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
        """Crowding (n,), exponent of the curvature, and normalisation of the losses (m,)."""
        if bool((front - ideal_point <= _AGE_PRECISION).all(axis=1).any()):
            return np.zeros(len(front)), 1.0, np.ones(front.shape[1])
        return super().survival_score(front, ideal_point)  # type: ignore[no-any-return]
