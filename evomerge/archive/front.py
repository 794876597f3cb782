"""The set of candidates with non-dominated evaluations. Works on evaluations and ids, not on genomes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge.core import Evaluation, EvaluationError, Objective, to_losses


class Front:
    """The candidates with non-dominated evaluations among those added so far, and their losses.

    The content depends only on the set of evaluations added, not on their order. Evaluations with equal losses
    are all kept. Evaluations that are not OK, or with a loss that is not finite, are ignored.

    Args:
        objectives: the objectives to compare; at least one.

    Raises:
        EvaluationError: there is no objective.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        if not objectives:
            raise EvaluationError("a front needs at least one objective, got none; name a task or a `cost.<key>`")
        self.objectives = tuple(objectives)
        self._losses_of: dict[str, tuple[float, ...]] = {}
        """member -> losses; members with equal losses share one tuple"""
        self._tied: dict[tuple[float, ...], list[str]] = {}
        """losses -> members, in the order of `_distinct`"""
        self._distinct = np.empty((0, len(self.objectives)))

    def __len__(self) -> int:
        return len(self._losses_of)

    def __contains__(self, candidate_id: object) -> bool:
        return candidate_id in self._losses_of

    def add(self, evaluation: Evaluation) -> bool:
        """Add an evaluation unless it is dominated; return whether it is a member afterwards.

        Adding a member again changes nothing and returns True. The time does not grow with the number of members that have equal losses.

        Raises:
            EvaluationError: an objective has no score, or a member with the same candidate id has different scores.
        """
        row = to_losses(self.objectives, [evaluation])[0]
        if not np.isfinite(row).all():
            return False
        name, loss = evaluation.candidate_id, tuple(row.tolist())
        known = self._losses_of.get(name)
        if known is not None:
            if known == loss:
                return True
            raise EvaluationError(
                f"candidate {name} is in the front with losses {list(known)} and was added again with {list(loss)}; a candidate can have only "
                "one evaluation per split"
            )
        if loss not in self._tied:
            if bool((self._distinct <= row).all(axis=1).any()):
                return False
            self._drop((row <= self._distinct).all(axis=1))
            self._tied[loss] = []
            self._distinct = np.vstack([self._distinct, row])
        tied = self._tied[loss]
        tied.append(name)
        self._losses_of[name] = loss if len(tied) == 1 else self._losses_of[tied[0]]
        return True

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the members, sorted."""
        return tuple(sorted(self._losses_of))

    @property
    def losses(self) -> NDArray[np.float64]:
        """The members' losses (n, m), to be minimised, in the order of `ids`."""
        rows = [self._losses_of[name] for name in self.ids]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.objectives))

    def _drop(self, dominated: NDArray[np.bool_]) -> None:
        """Remove dominated distinct losses, with their members."""
        if dominated.any():
            for loss in [loss for loss, out in zip(self._tied, dominated, strict=True) if out]:
                for name in self._tied.pop(loss):
                    del self._losses_of[name]
            self._distinct = self._distinct[~dominated]

    def hypervolume(self, reference: ArrayLike) -> float:
        """The volume dominated by the front and bounded by `reference`, a loss vector (m,); 0.0 if the front is empty.

        Members that do not strictly dominate the reference contribute nothing. Exact (moocore, dimension sweep).

        Raises:
            EvaluationError: the shape of `reference` is not (m,), or an entry is not finite.
        """
        return hypervolume(self._distinct, reference)


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """The volume dominated by the rows of `losses` (n, m) and bounded by `reference` (m,); rows that are not finite are ignored.

    Raises:
        EvaluationError: the shape of `reference` is not (m,), or an entry is not finite.
    """
    from moocore import hypervolume as exact_hypervolume

    points = np.asarray(losses, dtype=np.float64)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != points.shape[1:] or not np.isfinite(corner).all():
        raise EvaluationError(
            f"the reference point must be {points.shape[1]} finite losses, got {corner.tolist()}; losses are scores, "
            "negated if higher is better"
        )
    points = points[np.isfinite(points).all(axis=1)]
    points = points[(points < corner).all(axis=1)]
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(corner[0] - points.min())
    return float(exact_hypervolume(points, ref=corner))
