"""The knee of a front: the member with the best compromise between all objectives."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evomerge.archive.front import Front
from evomerge.core import EvaluationError


def knees(front: Front) -> tuple[str, ...]:
    """The ids of the members of `front` that lie farthest below the plane through its extreme members; almost always just one.

    Losses are first scaled to [0, 1] between the front's best and worst value per objective. If no member lies below that plane, as with
    a concave front, these are the extreme members themselves. With one objective it is the best member.

    Raises:
        EvaluationError: the front is empty.
    """
    if not front:
        raise EvaluationError("the front is empty, since no evaluation succeeded, so there is no knee to pick")
    distance = _distances(front.losses)
    return tuple(np.array(front.ids)[distance == distance.max()].tolist())


def knee_index(losses: ArrayLike) -> int:
    """The index of the row of `losses` (n, m) farthest below the plane through the extreme rows; the first of equal ones.

    The rows must be a non-dominated set. The extreme row of an objective is the one closest to that objective's axis
    (as in NSGA-III, 10.1109/TEVC.2013.2281535); if the extremes do not span a plane with positive intercepts, the plane
    through the unit points of the scaled axes is used.
    """
    return int(np.argmax(_distances(losses)))


def _distances(losses: ArrayLike) -> NDArray[np.float64]:
    """The distance of each row below the plane, (n,)."""
    points = np.asarray(losses, dtype=np.float64)
    best, worst = points.min(axis=0), points.max(axis=0)
    spread = np.where(worst > best, worst - best, 1.0)
    scaled = (points - best) / spread
    normal = _plane_normal(scaled)
    # rounding errors must not decide between rows at equal distances
    distance: NDArray[np.float64] = np.round((1.0 - scaled @ normal) / np.linalg.norm(normal), 12)
    return distance


def _plane_normal(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """The normal vector a (m,) of the plane a.x = 1 through the extreme rows of `scaled` (n, m)."""
    n_objectives = scaled.shape[1]
    weights = np.where(np.eye(n_objectives, dtype=bool), 1.0, 1e6)
    extremes = scaled[np.argmin((scaled[:, None, :] * weights[None]).max(axis=2), axis=0)]
    ones = np.ones(n_objectives)
    if np.linalg.matrix_rank(extremes) < n_objectives:
        return ones
    normal = np.linalg.solve(extremes, ones)
    return normal if bool((normal > 0.0).all()) else ones
