"""The strategy protocol: ask, tell, seed, recommend, state. Strategies see genomes and Evaluations, never recipes or tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.core import Candidate, Evaluation, Genome, Json, VectorGenome
from evomerge.core.settings import Settings

Floats = NDArray[np.float64]

_ID_DIGITS = 6

_ROUNDING = 1e-9
"""Largest difference in a coordinate between points that count as equal up to rounding."""


def candidate_id(index: int) -> str:
    """The id of the `index`-th proposal of a run, counted from 1: `c000001`, with more than six digits if needed."""
    return f"c{index:0{_ID_DIGITS}d}"


def nearly_equal(first: Genome, second: Genome | None) -> bool:
    """Whether two points are equal up to rounding; other genomes must be exactly equal."""
    if isinstance(first, VectorGenome) and isinstance(second, VectorGenome):
        return bool(np.allclose(first.values, second.values, rtol=0.0, atol=_ROUNDING))
    return first == second


class Strategy(Protocol):
    """Proposes candidates and learns from their evaluations. Deterministic given its seed and the order of calls.

    A strategy restored from `state_dict` in another process behaves exactly like the original.
    """

    def ask(self, n: int) -> Sequence[Candidate]:
        """Up to `n` new candidates, even while earlier ones are pending; fewer or none if it must wait for these.

        An empty answer leaves the state unchanged: no random number is drawn.
        """
        ...

    def repeat(self, recorded: Candidate) -> bool:
        """Make the next proposal but replace it by `recorded`, the candidate that an earlier session proposed at this point.

        The two differ if another processor or library version rounds differently, and from then on all proposals would. The recorded
        candidates have already been evaluated, so the strategy continues from them.

        Returns:
            Whether the proposal equals `recorded`.

        Raises:
            JournalError: `recorded` does not have the next id.
        """
        ...

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Take results in any order, matched by candidate id. If one of them is refused, none is used.

        Raises:
            EvaluationError: an id was never asked or already told, or an objective has no score.
        """
        ...

    def seed(self, candidates: Sequence[Candidate], evaluations: Sequence[Evaluation]) -> None:
        """Take points that were evaluated beforehand (baselines inside the space). Must be called before the first ask.

        Raises:
            EvaluationError: `ask` was called before, or ids do not match or look like ids of proposals.
            SpaceError: a genome does not fit the space.
        """
        ...

    def stop_reasons(self) -> Mapping[str, Json]:
        """Reasons for stopping the search, reason -> detail; empty: continue."""
        ...

    def diagnostics(self) -> Mapping[str, Json]:
        """Information for the user about what it has learned, such as the quality of its models; may be empty."""
        ...

    def recommend(self) -> Candidate:
        """The evaluated candidate that it currently considers best.

        Raises:
            EvaluationError: no evaluation has succeeded yet.
        """
        ...

    def state_dict(self) -> dict[str, Json]:
        """Everything needed to continue in another process, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Restore a `state_dict` into a fresh strategy that was created with the same arguments.

        Raises:
            JournalError: the state belongs to another strategy, or cannot be reproduced with the installed libraries.
        """
        ...


class StrategyOptions(Settings):
    """Base of every strategy's options."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A genome to be evaluated, and the ids of its parents."""

    genome: Genome
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """One finished evaluation as an algorithm sees it.

    Attributes:
        candidate: the evaluated candidate.
        losses: (m,), to be minimised; None if the evaluation FAILED or was INFEASIBLE, or if a loss is not finite or exceeds 1e150.
        stderr: (m,), standard errors of the losses, 0.0 if unknown; None if `losses` is None.
        items: (n_items,) item scores of all objectives' tasks in order, with the sign flipped if lower is better; None
            if there are none or the strategy does not use them.
    """

    candidate: Candidate
    losses: tuple[float, ...] | None
    stderr: tuple[float, ...] | None
    items: NDArray[np.float32] | None = None
