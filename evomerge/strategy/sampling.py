"""Points that fill the unit cube, one at a time."""

import warnings
from typing import Protocol

import numpy as np

from evomerge.core import VectorGenome

MAX_SOBOL_DIMENSION = 21201
"""scipy's table of direction numbers ends here (Joe and Kuo, 10.1137/070709359)."""


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
        with warnings.catch_warnings():
            # balance needs 2^k points at once; a stream has to live without
            warnings.simplefilter("ignore", UserWarning)
            point = self._sobol.random(1)[0]
        return VectorGenome(tuple(np.clip(point, 0.0, 1.0).tolist()))
