"""Points that fill the unit cube, one at a time."""

import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.spatial.distance import cdist
from scipy.special import ndtr, ndtri

from evomerge.core import VectorGenome
from evomerge.strategy.base import StrategyOptions

MAX_SOBOL_DIMENSION = 21201
"""scipy's table of direction numbers ends here (Joe and Kuo, 10.1137/070709359)."""

GROUP_CORRELATION = 0.9
MIN_GROUPED_DIMENSION = 12
"""With six coordinates it helped where groups are related no more than it cost where they are not."""

_EDGE = 1e-9
"""0 and 1 have no finite normal number."""


class FirstPointsOptions(StrategyOptions):
    """Options of strategies that begin with `first_points`."""

    group_correlation: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="correlation, in the first points, of what a parameter is in several layer and module groups; 0: none; "
        f"None: {GROUP_CORRELATION} from {MIN_GROUPED_DIMENSION} coordinates on, else 0",
    )


class PointStream(Protocol):
    """An endless sequence of points of [0, 1]^d."""

    def next(self) -> VectorGenome:
        """The next point."""
        ...


class UniformStream:
    """Independent uniform points."""

    def __init__(self, dimension: int, generator: np.random.Generator) -> None:
        self._dimension = dimension
        self._generator = generator

    def next(self) -> VectorGenome:
        """The next point."""
        return VectorGenome(tuple(self._generator.random(self._dimension).tolist()))


class SobolStream:
    """The Sobol sequence, Owen-scrambled; independent uniform points beyond `MAX_SOBOL_DIMENSION` dimensions."""

    def __init__(self, dimension: int, generator: np.random.Generator) -> None:
        from scipy.stats import qmc

        self._uniform = UniformStream(dimension, generator)
        self._sobol = qmc.Sobol(dimension, rng=generator) if dimension <= MAX_SOBOL_DIMENSION else None

    def next(self) -> VectorGenome:
        """The next point."""
        if self._sobol is None:
            return self._uniform.next()
        # balance needs 2^k points at once; a stream has to live without
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            point = self._sobol.random(1)[0]
        return VectorGenome(tuple(np.clip(point, 0.0, 1.0).tolist()))


class FamilyStream:
    """The points of another stream, each coordinate as evenly spread as there, those of a family correlated (a Gaussian copula).

    Args:
        stream: of points (d,).
        families: (d,) the number of each coordinate's family.
        correlation: of two normal numbers behind the coordinates of a family, in [0, 1).
    """

    def __init__(self, stream: PointStream, families: Sequence[int], correlation: float) -> None:
        self._stream = stream
        self._root = np.linalg.cholesky(family_correlation(families, correlation))

    def next(self) -> VectorGenome:
        """The next point."""
        inside = np.clip(self._stream.next().values, _EDGE, 1.0 - _EDGE)
        return VectorGenome(tuple(ndtr(self._root @ ndtri(inside)).tolist()))


def first_points(
    dimension: int, families: Sequence[int] | None, correlation: float | None, generator: np.random.Generator
) -> PointStream:
    """What a population begins with: Sobol points, in which the coordinates of a family go together.

    Args:
        dimension: d.
        families: (d,) the number of each coordinate's family; None = no two belong together.
        correlation: see `FamilyStream`; None = `GROUP_CORRELATION` from `MIN_GROUPED_DIMENSION` coordinates on, else 0.
        generator: what it draws from.
    """
    stream = SobolStream(dimension, generator)
    if correlation is None:
        correlation = GROUP_CORRELATION if dimension >= MIN_GROUPED_DIMENSION else 0.0
    return stream if families is None or correlation == 0.0 else FamilyStream(stream, families, correlation)


def next_to(points: NDArray[np.float64], taken: NDArray[np.float64], distance: float) -> NDArray[np.bool_]:
    """Which of `points` (k, d) are nearer to one of those `taken` (t, d) than `distance` times the root of d, (k,)."""
    return np.asarray(cdist(points, taken).min(axis=1) < distance * np.sqrt(points.shape[1]))


def family_correlation(families: Sequence[int], correlation: float) -> NDArray[np.float64]:
    """(d, d): `correlation` between the coordinates of a family, none between others."""
    together = np.equal.outer(families, families).astype(np.float64)
    return np.eye(len(together)) + correlation * (together - np.eye(len(together)))
