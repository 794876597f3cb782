"""The input of a merge method: the tensors that contribute to one output tensor, and its resolved parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evomerge.plan import Piece
from evomerge.plan.merge_plan import Scalars


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The inputs for one output tensor, all of the same shape, dtype and device. Methods must not change them.

    Attributes:
        output: name of the output tensor; part of the key of random masks.
        tensors: the sources, in recipe order, without a required or endpoint base.
        parameters: per source: parameter name -> value.
        base: the base model's tensor, if the method has a base.
        shared: the method's global parameters.
        seed: part of the key of random masks.
        pieces: of a `piecewise` merge.
    """

    output: str
    tensors: Sequence[torch.Tensor]
    parameters: Sequence[Scalars]
    base: torch.Tensor | None
    shared: Scalars
    seed: int
    pieces: Sequence[Piece] = ()

    def required_base(self) -> torch.Tensor:
        """The base; plans guarantee it for methods that need one."""
        if self.base is None:
            raise RuntimeError(f"the plan has no base for {self.output}")
        return self.base

    def values(self, name: str) -> list[float]:
        """The parameter `name` of every source."""
        return [float(parameters[name]) for parameters in self.parameters]


MergeFunction = Callable[[TensorGroup], torch.Tensor]
"""A method's reference: the formula in plain torch, in the dtype of the inputs; returns a new tensor."""
