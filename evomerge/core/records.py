"""The records that travel between packages: candidates, evaluation requests, evaluations, objectives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.core.errors import EvaluationError, SpaceError
from evomerge.core.genomes import Genome, VectorGenome
from evomerge.core.jsonable import Json
from evomerge.core.names import cost_key, cost_objective


class Split(StrEnum):
    """The three disjoint parts of a task's items."""

    SEARCH = "search"
    """scores for the strategy"""
    SELECT = "select"
    """ranks the finalists"""
    REPORT = "report"
    """only for the winner and the baselines, at the end of a search"""

    @classmethod
    def named(cls, name: str) -> "Split":
        """The split called `name`.

        Raises:
            EvaluationError: there is no such split.
        """
        if name not in list(cls):
            raise EvaluationError(f"unknown split {name!r}; known: {', '.join(cls)}")
        return cls(name)


class Status(StrEnum):
    """How an evaluation ended."""

    OK = "ok"
    INFEASIBLE = "infeasible"
    """the candidate violates a constraint; nothing was run"""
    FAILED = "failed"
    """an error occurred; see `Evaluation.error`"""


class Direction(StrEnum):
    """Whether a higher or a lower score is better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One proposal of a strategy. `id` is unique within a run; `parents` are ids of the candidates it came from."""

    id: str
    genome: Genome
    parents: tuple[str, ...] = ()

    @property
    def point(self) -> tuple[float, ...]:
        """Its coordinates (d,), for code that only works with points.

        Raises:
            SpaceError: it is a crossover of other candidates.
        """
        if not isinstance(self.genome, VectorGenome):
            raise SpaceError(f"candidate {self.id} is a crossover of {' and '.join(self.genome.parents)}, not a point")
        return self.genome.values


@dataclass(frozen=True, slots=True)
class Objective:
    """A named score or cost to be optimised.

    Attributes:
        name: a task's name or `cost.<key>`.
        direction: whether higher or lower is better.
        weight: its weight in the mean of objectives; None = see `weights_in_mean`.
        reference: its coordinate of the hypervolume's reference point, as a score; None = see `search.reference_losses`.
    """

    name: str
    direction: Direction = Direction.MAXIMIZE
    weight: float | None = None
    reference: float | None = None

    @property
    def is_cost(self) -> bool:
        """Whether it is a cost of the evaluation rather than a task's score."""
        return cost_key(self.name) is not None

    def to_json(self) -> dict[str, Json]:
        """The objective as stored in journals."""
        weight: dict[str, Json] = {} if self.weight is None else {"weight": self.weight}
        return {"name": self.name, "direction": self.direction.value, "reference": self.reference, **weight}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Objective":
        """Make an objective from the output of `to_json`."""
        return cls(data["name"], Direction(data["direction"]), data.get("weight"), data.get("reference"))

    @property
    def sign(self) -> float:
        """1.0 if a higher score is better, otherwise -1.0. Scores times `sign` are to be maximised, scores times `-sign` are losses."""
        return 1.0 if self.direction is Direction.MAXIMIZE else -1.0


def weights_in_mean(objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The weight of each objective in the mean of all: its own, or by default 1 for a score, and for a cost 1 only if no other objective counts.

    Costs are in other units than scores.
    """
    others = any(goal.weight or (goal.weight is None and not goal.is_cost) for goal in objectives)
    return tuple(
        float(not (others and objective.is_cost)) if objective.weight is None else objective.weight
        for objective in objectives
    )


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """A request to a worker to score a candidate.

    Attributes:
        candidate_id: the candidate to score.
        split: the items to use.
        recipe: the recipe as JSON (`Recipe.to_json`); None for the synthetic evaluation.
        values: unit coordinates (d,); None for crossovers and for baselines outside the space.
        attempt: 0 for the first attempt.
    """

    candidate_id: str
    split: Split
    recipe: Mapping[str, Json] | None = None
    values: tuple[float, ...] | None = None
    attempt: int = 0

    def failed(self, reason: str, cost: Mapping[str, float] | None = None) -> "Evaluation":
        """The failed evaluation of this request."""
        return Evaluation(self.candidate_id, self.split, Status.FAILED, cost=cost or {}, error=reason)


@dataclass(frozen=True, slots=True)
class LostWorker:
    """A worker that died or hung while evaluating a request, probably because of it; the pool retries the request."""

    candidate_id: str
    split: Split
    reason: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one request.

    Attributes:
        candidate_id: see `EvaluationRequest`.
        split: see `EvaluationRequest`.
        status: only `OK` evaluations have scores.
        scores: task name -> mean score over the items (its `Objective` tells whether higher or lower is better).
        stderr: task name -> standard error of that mean.
        item_scores: task name -> (n_items,) float32, in the task's fixed item order.
        sample_sizes: name of a group of tasks -> number of items of each of its tasks, in the order of `item_scores`.
        cost: costs of this evaluation by name (`items`, `generated_tokens`, ... and times in seconds, `*_s`).
        error: the reason if it failed, otherwise None.
    """

    candidate_id: str
    split: Split
    status: Status
    scores: Mapping[str, float] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    item_scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    sample_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    def value(self, name: str) -> float:
        """The score called `name`, or the cost if it is an objective's name of a cost (`cost.<key>`).

        Raises:
            EvaluationError: there is no such score or cost.
        """
        key = cost_key(name)
        try:
            return self.scores[name] if key is None else self.cost[key]
        except KeyError:
            known = sorted([*self.scores, *map(cost_objective, self.cost)])
            raise EvaluationError(
                f"candidate {self.candidate_id} has no score {name!r}; it has: {', '.join(known) or 'none'}"
            ) from None


def to_losses(objectives: Sequence[Objective], evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
    """Scores as losses to be minimised: (n, m), NaN in the rows of evaluations that are not `OK`."""
    losses = np.full((len(evaluations), len(objectives)), np.nan)
    for row, evaluation in enumerate(evaluations):
        if evaluation.status is Status.OK:
            for column, objective in enumerate(objectives):
                losses[row, column] = -objective.sign * evaluation.value(objective.name)
    return losses
