"""The table of merge methods: their parameters, ranges and defaults. One row a method; the tensor formula of each is in `evomerge/weights/methods/<name>.py`.

Knows nothing of tensors, so that a search space can be derived and a config checked without loading torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from types import MappingProxyType

from evomerge.core import RecipeError


class Scope(StrEnum):
    """Who carries a parameter."""

    MODEL = "model"
    """one value for every source that is merged"""
    GLOBAL = "global"
    """one value for the whole merge"""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of a merge method.

    Attributes:
        name: mergekit's name.
        scope: per source or once.
        default: used where a recipe says nothing; None = required.
        low, high: what the formula admits (inclusive; None = unbounded).
        search_low, search_high: the bounds a search uses unless told otherwise; both None = not searched.
        search_default: whether a search varies it when the config names no parameters.
    """

    name: str
    scope: Scope
    default: float | bool | None
    low: float | None = None
    high: float | None = None
    search_low: float | None = None
    search_high: float | None = None
    search_default: bool = False


class BaseRole(StrEnum):
    """What a method does with the base model."""

    REQUIRED = "required"
    """task vectors are taken against it; it is no source"""
    ENDPOINT = "endpoint"
    """it is the first of the merged models (slerp: t = 0)"""
    SOURCE = "source"
    """a source like the others where it is listed (linear)"""


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One merge method.

    Attributes:
        name: mergekit's name.
        parameters: see `ParameterSpec`.
        base: what the base model is to it.
        min_sources, max_sources: how many models besides a required or endpoint base it takes (None = any number).
        deterministic: False where random masks make the result depend on the recipe's seed.
        paper: where it comes from.
        inert: parameters that mergekit takes here and that change nothing in the result; recipes may hold them.
    """

    name: str
    parameters: tuple[ParameterSpec, ...]
    base: BaseRole
    paper: str
    min_sources: int = 1
    max_sources: int | None = None
    deterministic: bool = True
    inert: tuple[str, ...] = ()

    def parameter(self, name: str) -> ParameterSpec:
        """The parameter called `name`.

        Raises:
            RecipeError: the method has none of that name.
        """
        for spec in self.parameters:
            if spec.name == name:
                return spec
        known = ", ".join(spec.name for spec in self.parameters)
        near = get_close_matches(name, [spec.name for spec in self.parameters], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise RecipeError(f"merge method {self.name!r} has no parameter {name!r}{hint} It has: {known}")


def _weight(default: float | None = None, high: float = 1.5) -> ParameterSpec:
    return ParameterSpec("weight", Scope.MODEL, default, search_low=0.0, search_high=high, search_default=True)


_DENSITY = ParameterSpec("density", Scope.MODEL, 1.0, 0.0, 1.0, search_low=0.05, search_high=1.0, search_default=True)
_LAMBDA = ParameterSpec("lambda", Scope.GLOBAL, 1.0, search_low=0.3, search_high=2.0)


def _normalize(default: bool) -> ParameterSpec:
    return ParameterSpec("normalize", Scope.GLOBAL, default)


def _rescale(default: bool) -> ParameterSpec:
    return ParameterSpec("rescale", Scope.GLOBAL, default)


_T = ParameterSpec("t", Scope.GLOBAL, None, 0.0, 1.0, search_low=0.0, search_high=1.0, search_default=True)

METHODS: Mapping[str, MethodSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            MethodSpec("linear", (_weight(), _normalize(True)), BaseRole.SOURCE, "arXiv 2203.05482 (model soups)"),
            MethodSpec(
                "task_arithmetic",
                (_weight(), _LAMBDA, _normalize(False)),
                BaseRole.REQUIRED,
                "arXiv 2212.04089",
                inert=("int8_mask", "density", "rescale"),
            ),
            MethodSpec(
                "ties",
                (_weight(), _DENSITY, _LAMBDA, _normalize(True), _rescale(False)),
                BaseRole.REQUIRED,
                "arXiv 2306.01708",
                inert=("int8_mask",),
            ),
            MethodSpec(
                "dare_ties",
                (_weight(), _DENSITY, _LAMBDA, _normalize(False), _rescale(True)),
                BaseRole.REQUIRED,
                "arXiv 2311.03099",
                deterministic=False,
                inert=("int8_mask",),
            ),
            MethodSpec("slerp", (_T,), BaseRole.ENDPOINT, "Shoemake, SIGGRAPH 1985", max_sources=1),
        )
    }
)


def method_spec(name: str) -> MethodSpec:
    """The row of the method called `name`.

    Raises:
        RecipeError: there is no such method; the message names the nearest one.
    """
    try:
        return METHODS[name]
    except KeyError:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown merge method {name!r}{hint} Known: {', '.join(sorted(METHODS))}") from None
