"""Placeholder of the sibling's module while it is being written."""

from dataclasses import dataclass
from collections.abc import Sequence
from evomerge.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Hop:
    layer: int
    weights: tuple[tuple[str, float], ...]
    scale: float = 1.0


class Folding: ...


def folding_of(header):
    raise NotImplementedError


def stack_recipe(hops: Sequence[Hop], *, ends, folding, out_dtype, name=None) -> Recipe:
    raise NotImplementedError
