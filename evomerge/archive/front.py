"""The set of evaluations that no other one dominates. It never sees a genome: evaluations in, evaluations out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge.core import Evaluation, EvaluationError, Objective, to_losses


class Front:
    """The non-dominated evaluations seen so far under `objectives`.

    The content depends only on the set of evaluations added, never on their order. Evaluations with equal losses
    stay side by side. Evaluations that are not OK, or with a loss that is not finite, never enter.

    Args:
        objectives: what is compared, and in which direction; at least one.

    Raises:
        EvaluationError: there is no objective.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        if not objectives:
            raise EvaluationError("a front needs at least one objective, got none; name a task or a `cost.<key>`")
        self.objectives = tuple(objectives)
        self._members: list[Evaluation] = []
        self._losses = np.empty((0, len(self.objectives)))

    def __len__(self) -> int:
        return len(self._members)

    def add(self, evaluation: Evaluation) -> bool:
        """Offers one evaluation; True if it is a member afterwards.

        Adding a member again changes nothing and answers True.

        Raises:
            EvaluationError: an objective has no score, or a member with the same candidate id has other scores.
        """
        loss = to_losses(self.objectives, [evaluation])[0]
        if not np.isfinite(loss).all():
            return False
        for member, known in zip(self._members, self._losses, strict=True):
            if member.candidate_id == evaluation.candidate_id:
                if np.array_equal(known, loss):
                    return True
                raise EvaluationError(
                    f"candidate {evaluation.candidate_id} is in the front with losses {known.tolist()} and is added "
                    f"again with {loss.tolist()}; one candidate has one evaluation per split"
                )
        no_worse = (self._losses <= loss).all(axis=1)
        if bool((no_worse & (self._losses < loss).any(axis=1)).any()):
            return False
        keep = ~((loss <= self._losses).all(axis=1) & (loss < self._losses).any(axis=1))
        members = [member for member, kept in zip(self._members, keep, strict=True) if kept]
        losses = np.vstack([self._losses[keep], loss])
        members.append(evaluation)
        order = sorted(range(len(members)), key=lambda row: members[row].candidate_id)
        self._members = [members[row] for row in order]
        self._losses = losses[order]
        return True

    @property
    def members(self) -> tuple[Evaluation, ...]:
        """The non-dominated evaluations, ordered by candidate id."""
        return tuple(self._members)

    @property
    def losses(self) -> NDArray[np.float64]:
        """The members' losses (n, m), to be minimised, in the order of `members`; a copy."""
        return self._losses.copy()

    def hypervolume(self, reference: ArrayLike) -> float:
        """The volume dominated by the front and bounded by `reference`, a loss vector (m,); 0.0 when empty.

        Members that do not dominate the reference add nothing. Exact (moocore, dimension sweep).

        Raises:
            EvaluationError: `reference` has another shape than (m,), or an entry that is not finite.
        """
        return hypervolume(self._losses, reference)


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """The volume dominated by the rows of `losses` (n, m) and bounded by `reference` (m,); rows with NaN are left out.

    Raises:
        EvaluationError: `reference` has another shape than (m,), or an entry that is not finite.
    """
    from moocore import hypervolume as exact_hypervolume

    points = np.asarray(losses, dtype=np.float64)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != points.shape[1:] or not np.isfinite(corner).all():
        raise EvaluationError(
            f"the reference point must be {points.shape[1]} finite losses, got {corner.tolist()}; losses are scores with "
            "the sign flipped where higher is better"
        )
    points = points[np.isfinite(points).all(axis=1)]
    points = points[(points < corner).all(axis=1)]
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(corner[0] - points.min())
    return float(exact_hypervolume(points, ref=corner))
