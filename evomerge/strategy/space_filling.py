"""`random` and `sobol`: the baselines with which every report compares at equal budget. They learn nothing."""

from typing import Any, ClassVar

from evomerge.core import random_stream
from evomerge.strategy.base import Proposal, Told
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.sampling import SobolStream, UniformStream


class _SpaceFilling(ReplayStrategy):
    """Proposes the points of a stream; FAILED results are ignored."""

    stream_type: ClassVar[type[UniformStream] | type[SobolStream]]
    max_known = 100

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stream = self.stream_type(self.dimension, random_stream(self.random_seed, self.name))

    def _propose(self) -> Proposal:
        return Proposal(self._stream.next())

    def _withdraw(self) -> bool:
        return True

    def _learn(self, told: Told) -> None:
        """Learn nothing; `recommend` uses the recorded results."""


class RandomSearch(_SpaceFilling):
    """Independent uniform points."""

    name: ClassVar[str] = "random"
    stream_type = UniformStream


class SobolSearch(_SpaceFilling):
    """The scrambled Sobol sequence (Owen; scipy): covers the cube more evenly than `random`.

    Points are proposed in the sequence's order, so the first 2^k of them are balanced.
    """

    name: ClassVar[str] = "sobol"
    stream_type = SobolStream
