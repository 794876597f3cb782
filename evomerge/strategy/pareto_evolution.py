"""Steady-state Pareto search with pymoo's operators: the common part of `nsga2` and its relatives.

There are no generations: each ask mates two members of the current population (binary tournament, simulated binary crossover,
polynomial mutation), each result enters immediately, and the survival rule drops one member. Any number of evaluations
can therefore be pending. The first members are the seeds, then the points of a scrambled Sobol sequence in which the coordinates of a family
are correlated. Categorical coordinates come from either parent and are mutated to another choice with the same probability per coordinate.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pymoo.core.individual import Individual
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.selection.tournament import TournamentSelection

from evomerge.core import Candidate, ConfigError, Genome, VectorGenome, random_stream
from evomerge.strategy.base import Proposal, StrategyOptions, Told
from evomerge.strategy.inheritance import inherited_choices
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.sampling import FirstPointsOptions, first_points

_MAX_MATINGS = 50
"""Attempts to find an offspring that was not proposed before; after these, a Sobol point is used."""


class ParetoEvolutionOptions(FirstPointsOptions):
    """Options of the population-based Pareto strategies."""

    population_size: int = Field(
        20, ge=4, description="members; 16 to 24 suit expensive evaluations, pymoo's 100 suits thousands of them"
    )
    crossover_probability: float = Field(
        0.9, gt=0.0, le=1.0, description="probability of mixing two parents (Deb 2002)"
    )
    crossover_eta: float = Field(
        15.0, gt=1.0, description="SBX distribution index: higher values stay closer to the parents (Deb 2002)"
    )
    mutation_eta: float = Field(20.0, gt=1.0, description="polynomial mutation's distribution index (Deb 2002)")
    mutation_probability: float | None = Field(
        None, gt=0.0, le=1.0, description="probability per coordinate; None: 1/d, at most 0.5 (Deb 2002)"
    )


class ParetoEvolution(ReplayStrategy):
    """A steady-state evolutionary search; subclasses choose tournament and survival.

    FAILED and INFEASIBLE candidates never enter the population. Seeds are its first members.
    """

    options_type: ClassVar[type[StrategyOptions]] = ParetoEvolutionOptions
    uses_families: ClassVar[bool] = True
    options: ParetoEvolutionOptions
    min_objectives: ClassVar[int] = 2
    tournament_type: ClassVar[str] = "comp_by_rank_and_crowding"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.objectives) < self.min_objectives:
            raise ConfigError(
                f"strategy {self.name} needs at least {self.min_objectives} objectives, got {len(self.objectives)}; "
                "use nsga2 or cma_es for one"
            )
        options = self.options
        self._generator = random_stream(self.random_seed, self.name, "mating")
        self._initial = first_points(
            self.dimension,
            self.families,
            options.group_correlation,
            random_stream(self.random_seed, self.name, "sobol"),
        )
        self._problem = Problem(n_var=self.dimension, n_obj=len(self.objectives), xl=0.0, xu=1.0)
        self._selection = TournamentSelection(func_comp=self._tournament())
        # the attributes that pymoo's tournament reads from its algorithm
        self._rules = SimpleNamespace(tournament_type=self.tournament_type, random_state=self._generator)
        self._crossover = SBX(prob=options.crossover_probability, eta=options.crossover_eta, n_offsprings=1)
        self._mutation = PM(prob=1.0, eta=options.mutation_eta, prob_var=options.mutation_probability)
        self._survival = self._make_survival()
        self._population = Population()
        self._sobol_pending: set[str] = set()
        self._seen: set[int] = set()  # hashes; a collision only costs one more mating

    @abstractmethod
    def _tournament(self) -> Callable[..., NDArray[np.int_]]:
        """The pymoo function that decides between two members."""

    @abstractmethod
    def _make_survival(self) -> Any:
        """The pymoo survival operator that keeps `population_size` members."""

    def _start(self, seeds: Sequence[Told]) -> None:
        members = [self._individual(seed) for seed in seeds if seed.losses is not None]
        self._seen.update(hash(self._place(seed.candidate.genome)) for seed in seeds)
        if members:
            self._population = self._survive(Population.merge(self._population, Population.create(*members)))

    def _propose(self) -> Proposal:
        expected = len(self._population) + len(self._sobol_pending)
        if expected < self.options.population_size or len(self._population) < 2:
            proposal = self._next_initial()
            self._sobol_pending.add(self._next_id)
        else:
            proposal = self._mate()
        self._seen.add(hash(self._place(proposal.genome)))
        return proposal

    def _learn(self, told: Told) -> None:
        self._sobol_pending.discard(told.candidate.id)
        if told.losses is None:
            return
        self._population = self._survive(Population.merge(self._population, Population.create(self._individual(told))))

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:
        self._seen.add(hash(self._place(recorded.genome)))

    def _individual(self, told: Told) -> Individual:
        individual = Individual(X=np.array(told.candidate.point))
        individual.set("F", np.array(told.losses))
        individual.set("candidate_id", told.candidate.id)
        return individual

    def _survive(self, population: Population) -> Population:
        return self._survival.do(
            self._problem,
            population,
            n_survive=min(self.options.population_size, len(population)),
            algorithm=self._rules,
            random_state=self._generator,
        )

    def _mate(self) -> Proposal:
        for _ in range(_MAX_MATINGS):
            parents = self._selection(
                self._problem, self._population, 1, 2, to_pop=True, algorithm=self._rules, random_state=self._generator
            )
            child = self._crossover.do(self._problem, parents, random_state=self._generator)
            child = self._mutation.do(self._problem, child, random_state=self._generator)
            if len(self._discrete):
                first, second = (parent.X[self._discrete] for parent in parents[0])
                rate = self.options.mutation_probability or min(0.5, 1.0 / self.dimension)
                child[0].X[self._discrete] = inherited_choices(first, second, self._counts, rate, self._generator)
            genome = VectorGenome(_unit_tuple(child[0].X))
            if hash(self._place(genome)) not in self._seen:
                return Proposal(genome, tuple(parent.get("candidate_id") for parent in parents[0]))
        return self._next_initial()

    def _next_initial(self) -> Proposal:
        """The next Sobol point that is not equivalent to an earlier proposal; after a few failed attempts, one of the remaining points."""
        point = self._initial.next()
        for _ in range(_MAX_MATINGS if len(self._discrete) else 0):
            if hash(self._place(point)) not in self._seen:
                break
            point = self._initial.next()
        return self._unknown_instead(Proposal(point))


def _unit_tuple(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(np.clip(values.astype(np.float64), 0.0, 1.0).tolist())
