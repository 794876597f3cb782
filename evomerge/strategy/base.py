"""What a strategy is: ask, tell, seed, recommend, state. It sees genomes and Evaluations, never a recipe or a tensor."""

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
"""Largest difference of a coordinate between points that are the same but for rounding."""


def candidate_id(index: int) -> str:
    """The id of the `index`-th proposal of a run, counted from 1: `c000001`; longer than six digits where needed."""
    return f"c{index:0{_ID_DIGITS}d}"


def nearly_equal(first: Genome, second: Genome | None) -> bool:
    """Whether two points differ by rounding at most; other genomes are equal or they are not."""
    if isinstance(first, VectorGenome) and isinstance(second, VectorGenome):
        return bool(np.allclose(first.values, second.values, rtol=0.0, atol=_ROUNDING))
    return first == second


class Strategy(Protocol):
    """Proposes candidates and learns from their evaluations. Deterministic given its seed and the order of calls.

    Restored from `state_dict` in another process, it cannot be told from the original by any public method.
    """

    def ask(self, n: int) -> Sequence[Candidate]:
        """Up to `n` new candidates, also while earlier ones are pending; fewer or none where it must wait for them.

        An empty answer leaves the state as it was: no random number is drawn.
        """
        ...

    def repeat(self, recorded: Candidate) -> bool:
        """Makes the next proposal and puts `recorded` in its place: what an earlier session was given there.

        The two differ where another processor or another version of a library rounds otherwise, and soon after that everywhere. The
        results of what was recorded are paid for, so it is that which the strategy goes on from.

        Returns:
            Whether the proposal was the same.

        Raises:
            JournalError: another candidate comes next.
        """
        ...

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Takes results in any order, matched by candidate id. Nothing is learned when one of them is refused.

        Raises:
            EvaluationError: an id was never asked, or was told before, or an objective has no score.
        """
        ...

    def seed(self, candidates: Sequence[Candidate], evaluations: Sequence[Evaluation]) -> None:
        """Takes points that were evaluated beforehand (baselines inside the space), before the first ask.

        Raises:
            EvaluationError: something was asked already, ids do not match or look like an asked id.
            SpaceError: a genome does not fit the space.
        """
        ...

    def stop_reasons(self) -> Mapping[str, Json]:
        """Why asking further is pointless, reason -> detail; empty: go on."""
        ...

    def diagnostics(self) -> Mapping[str, Json]:
        """What it has learned about the problem that a user should know, such as how good its models are; {}: nothing."""
        ...

    def recommend(self) -> Candidate:
        """The evaluated candidate it would use now.

        Raises:
            EvaluationError: no evaluation has ended well yet.
        """
        ...

    def state_dict(self) -> dict[str, Json]:
        """Everything needed to go on elsewhere, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Restores a `state_dict` into a fresh strategy that was made with the same arguments.

        Raises:
            JournalError: the state is of another strategy, or cannot be reproduced with the installed libraries.
        """
        ...


class StrategyOptions(Settings):
    """Base of every strategy's options."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A genome to be evaluated and the ids of the candidates it was made from."""

    genome: Genome
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """One finished evaluation as an algorithm sees it.

    Attributes:
        candidate: what was evaluated.
        losses: (m,), to be minimised; None where the evaluation FAILED, was INFEASIBLE, or a loss is not finite or beyond 1e150.
        stderr: (m,), standard errors of the losses, 0.0 where unknown; None with `losses`.
        items: (n_items,) item scores of all objectives' tasks in their order, the sign flipped where lower is better; None
            where there are none or the strategy does not read them.
    """

    candidate: Candidate
    losses: tuple[float, ...] | None
    stderr: tuple[float, ...] | None
    items: NDArray[np.float32] | None = None
