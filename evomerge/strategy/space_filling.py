"""`random` and `sobol`: the baselines that every report compares with at equal budget. They learn nothing."""

from typing import ClassVar

from evomerge.core import random_stream
from evomerge.strategy.base import Proposal, Told
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.sampling import PointStream, SobolStream, UniformStream


class _SpaceFilling(ReplayStrategy):
    """Proposes the points of a stream that is made at the first ask; FAILED results count for nothing."""

    _stream: PointStream | None = None

    def _make_stream(self) -> PointStream:
        raise NotImplementedError

    def _propose(self) -> Proposal:
        if self._stream is None:
            self._stream = self._make_stream()
        return Proposal(self._stream.next())

    def _learn(self, told: Told) -> None:
        """Nothing is learned; `recommend` looks at what was told."""


class RandomSearch(_SpaceFilling):
    """Independent uniform points."""

    name: ClassVar[str] = "random"

    def _make_stream(self) -> PointStream:
        return UniformStream(self.dimension, random_stream(self.random_seed, "random"))


class SobolSearch(_SpaceFilling):
    """The scrambled Sobol sequence (Owen; scipy): covers the cube more evenly than `random`.

    Points are proposed in the sequence's order, so the first 2^k of them are balanced.
    """

    name: ClassVar[str] = "sobol"

    def _make_stream(self) -> PointStream:
        return SobolStream(self.dimension, random_stream(self.random_seed, "sobol"))
