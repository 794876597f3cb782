"""Streams of points that fill the unit cube."""

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
"""With six coordinates, the gain for related groups did not exceed the loss for unrelated ones."""

_EDGE = 1e-9
"""Points are clipped this far from 0 and 1, whose normal quantiles are infinite."""


class FirstPointsOptions(StrategyOptions):
    """Options of strategies that begin with `first_points`."""

    group_correlation: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="correlation, in the first points, of a parameter's values in several layer and module groups; 0: none; "
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
        # scipy warns that balance needs 2^k points at once, which a stream cannot provide
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            point = self._sobol.random(1)[0]
        return VectorGenome(tuple(np.clip(point, 0.0, 1.0).tolist()))


class FamilyStream:
    """The points of another stream with correlated coordinates within a family (a Gaussian copula); each coordinate stays uniform.

    Args:
        stream: a stream of points (d,).
        families: (d,), the index of each coordinate's family.
        correlation: of the normal numbers underlying two coordinates of a family, in [0, 1).
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
    """The initial points of a population: Sobol points in which the coordinates of a family are correlated.

    Args:
        dimension: d.
        families: (d,), the index of each coordinate's family; None = no families.
        correlation: see `FamilyStream`; None = `GROUP_CORRELATION` from `MIN_GROUPED_DIMENSION` coordinates on, else 0.
        generator: source of random numbers.
    """
    stream = SobolStream(dimension, generator)
    if correlation is None:
        correlation = GROUP_CORRELATION if dimension >= MIN_GROUPED_DIMENSION else 0.0
    return stream if families is None or correlation == 0.0 else FamilyStream(stream, families, correlation)


def next_to(points: NDArray[np.float64], taken: NDArray[np.float64], distance: float) -> NDArray[np.bool_]:
    """Mask (k,) of those `points` (k, d) that are closer than `distance` times sqrt(d) to one of `taken` (t, d)."""
    return np.asarray(cdist(points, taken).min(axis=1) < distance * np.sqrt(points.shape[1]))


def family_correlation(families: Sequence[int], correlation: float) -> NDArray[np.float64]:
    """(d, d): `correlation` between the coordinates of a family, none between others."""
    together = np.equal.outer(families, families).astype(np.float64)
    return np.eye(len(together)) + correlation * (together - np.eye(len(together)))
