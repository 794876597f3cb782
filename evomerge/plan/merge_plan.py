"""`MergePlan`: what to compute for each output tensor. Names and numbers only; no tensors are touched here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


Scalars = Mapping[str, float | bool]
"""parameter name -> value"""

COPY_METHOD = "passthrough"
"""the method of integer buffers, which cannot be averaged"""


TensorKey = tuple[str, str]
"""(model, tensor name)"""


class TensorInput(NamedTuple):
    """One input of a step: tensor `tensor` of the model `source`, with the method's per-source parameters resolved to scalars.

    A named tuple for speed, like `TensorStep`: a candidate of models with many experts creates tens of thousands.
    """

    source: str
    tensor: str
    parameters: Scalars

    @property
    def key(self) -> TensorKey:
        """Identify it among the tensors of all models."""
        return self[:2]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a flat output tensor up to `end`: a weighted sum of the inputs, plus noise.

    Attributes:
        end: index of the first element after it.
        weights: one per input.
        noise: (seed, standard deviation) of each noise term.
    """

    end: int
    weights: tuple[float, ...]
    noise: tuple[tuple[int, float], ...] = ()


class TensorStep(NamedTuple):
    """One output tensor.

    Attributes:
        output: its name in the merged checkpoint.
        shape: its shape.
        method: merge method.
        inputs: the sources in recipe order.
        base: the base model's tensor, if the method has a base.
        parameters: the method's global parameters resolved to scalars.
        pieces: the pieces of a `piecewise` step in order; the last ends with the tensor.
    """

    output: str
    shape: tuple[int, ...]
    method: str
    inputs: tuple[TensorInput, ...]
    base: TensorInput | None
    parameters: Scalars
    pieces: tuple[Piece, ...] = ()

    @property
    def n_elements(self) -> int:
        """Number of elements of the output."""
        return math.prod(self.shape)

    @property
    def sources(self) -> tuple[TensorInput, ...]:
        """All tensors that are read: the inputs, then the base if there is one."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def required_base(self) -> TensorInput:
        """The base of a method that needs one; `check_recipe` has refused recipes without it."""
        if self.base is None:
            raise RuntimeError(f"{self.method} of {self.output!r} was planned without a base")
        return self.base

    @property
    def is_copy(self) -> bool:
        """Whether an integer buffer is copied unchanged (a `passthrough` of weights has a scale)."""
        return self.method == COPY_METHOD and not self.inputs[0].parameters


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All steps of one merge.

    Attributes:
        steps: in the order in which they are computed.
        n_layers: number of transformer layers of the result.
        output_bytes: size of the result in `dtype`.
        dtype: type to which results are rounded, once ("bfloat16", "float16", "float32").
        math_dtype: type of the arithmetic.
        seed: of random masks.
        idle: tensors of a target that may keep their current values if these are finite.
    """

    steps: tuple[TensorStep, ...]
    n_layers: int
    output_bytes: int
    dtype: str
    math_dtype: str
    seed: int
    idle: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Region:
    """Where a part of a checkpoint tensor lives in an engine.

    Attributes:
        index: which part of the checkpoint tensor, one slice per dimension.
        view: a writable view of a live parameter, of that part's shape.
    """

    index: tuple[slice, ...]
    view: "torch.Tensor"


class WeightTarget(Protocol):
    """Something merged tensors are written into: an engine's live parameters."""

    def names(self) -> Sequence[str]:
        """Checkpoint tensor names that the target holds; a merge must write every one."""
        ...

    def regions(self, tensor: str) -> Sequence[Region]:
        """The places of `tensor`; together they cover every element that the engine uses.

        Raises:
            KeyError: the target has no such tensor.
        """
        ...
