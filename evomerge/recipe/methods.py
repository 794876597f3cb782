"""The table of merge methods with their parameters, ranges and defaults.

The formula of a method is in `evomerge/weights/methods/<name>.py`.

Knows nothing of tensors, so that a search space can be derived and a config checked without importing torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from evomerge.core import RecipeError, did_you_mean
from evomerge.recipe.parts import Parameters, Slice


class Scope(StrEnum):
    """What a parameter applies to."""

    MODEL = "model"
    """one value per source"""
    GLOBAL = "global"
    """one value for the whole merge"""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of a merge method.

    Attributes:
        name: mergekit's name.
        scope: per source, or one for the whole merge.
        default: value if a recipe does not set it; None = required.
        low, high: valid range of the formula (inclusive; None = unbounded).
        above_low: exclude `low` itself.
        whole: allow whole numbers only.
        search_low, search_high: default bounds of a search; both None = not searched.
        search_default: whether a search varies it when the config names no parameters.
        search_value: for a switch, the value in a search over weights unless it is set; None = the default.
    """

    name: str
    scope: Scope
    default: float | bool | None
    low: float | None = None
    high: float | None = None
    search_low: float | None = None
    search_high: float | None = None
    search_default: bool = False
    above_low: bool = False
    whole: bool = False
    search_value: bool | None = None

    def admits(self, value: float) -> bool:
        """Whether `value` is in range."""
        too_low = self.low is not None and (value < self.low or (self.above_low and value == self.low))
        return not too_low and (self.high is None or value <= self.high) and not (self.whole and value % 1)

    @property
    def range(self) -> str:
        """The range in words."""
        if self.whole:
            return f"a whole number from {self.low:g}"
        if self.above_low:
            return f"more than {self.low:g}"
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else "any number"


class BaseRole(StrEnum):
    """What a method does with the base model."""

    REQUIRED = "required"
    """task vectors are relative to it; it is not a source"""
    ENDPOINT = "endpoint"
    """it is the first of the merged models (slerp: t = 0)"""
    OPTIONAL = "optional"
    """if there is one, task vectors are relative to it"""
    SOURCE = "source"
    """if it is listed, it is a source like the others (linear)"""


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One merge method.

    Attributes:
        name: mergekit's name.
        parameters: see `ParameterSpec`.
        base: the role of the base model.
        min_sources, max_sources: number of models it takes, not counting a required or endpoint base (None = any number).
        deterministic: False if random masks make the result depend on the recipe's seed.
        paper: its origin.
        inert: parameters that mergekit accepts here but that do not change the result; recipes may contain them at any level.
    """

    name: str
    parameters: tuple[ParameterSpec, ...]
    base: BaseRole
    paper: str
    min_sources: int = 1
    max_sources: int | None = None
    deterministic: bool = True
    inert: tuple[ParameterSpec, ...] = ()

    @property
    def needs_base(self) -> bool:
        """Whether a recipe must name a base."""
        return self.base in (BaseRole.REQUIRED, BaseRole.ENDPOINT)

    @property
    def base_alone(self) -> bool:
        """Whether a base without other models gives that base, as in mergekit (published recipes merge adapters this way)."""
        return self.base is BaseRole.REQUIRED and self.min_sources == 1 and self.max_sources is None

    def takes(self, n_sources: int) -> bool:
        """Whether `n_sources` models, not counting a required or endpoint base, can be merged."""
        return self.min_sources <= n_sources and (self.max_sources is None or n_sources <= self.max_sources)

    def appends_base(self, part: Slice, parameters: Parameters) -> bool:
        """Whether a base that `part` does not list is an input anyway, as in mergekit: in a whole-model merge that can take another model.

        If a required parameter of an input has no value (mergekit then raises an error), only the base's config and tokenizer are used.

        Args:
            part: a slice of the recipe.
            parameters: the recipe's global parameters.
        """
        if part.sources[0].layer_range is not None or len(part.sources) == self.max_sources:
            return False
        needed = [row.name for row in self.parameters if row.default is None]
        return all(name in part.parameters or name in parameters for name in needed)

    @property
    def source_range(self) -> str:
        """The number of models it takes, in words."""
        if self.min_sources == self.max_sources:
            return f"exactly {self.min_sources}"
        return (
            f"at least {self.min_sources}" if self.max_sources is None else f"{self.min_sources} to {self.max_sources}"
        )

    def parameter(self, name: str) -> ParameterSpec:
        """The parameter called `name`.

        Raises:
            RecipeError: the method has no such parameter.
        """
        for spec in self.parameters:
            if spec.name == name:
                return spec
        names = [spec.name for spec in self.parameters]
        hint = did_you_mean(name, names)
        raise RecipeError(
            f"merge method {self.name!r} has no parameter {name!r}{hint} It has: {', '.join(names) or 'none'}"
        )

    def known_parameter(self, name: str) -> ParameterSpec:
        """Like `parameter`, including inert parameters."""
        return next((spec for spec in self.inert if spec.name == name), None) or self.parameter(name)


_WEIGHT = ParameterSpec("weight", Scope.MODEL, None, search_low=0.0, search_high=1.5, search_default=True)
_DENSITY = ParameterSpec("density", Scope.MODEL, 1.0, 0.0, 1.0, search_low=0.05, search_high=1.0, search_default=True)
_LAMBDA = ParameterSpec("lambda", Scope.GLOBAL, 1.0, search_low=0.3, search_high=2.0)


def _inert(name: str, default: float | bool) -> ParameterSpec:
    return ParameterSpec(name, Scope.MODEL, default)


_T = ParameterSpec("t", Scope.GLOBAL, None, 0.0, 1.0, search_low=0.0, search_high=1.0, search_default=True)

_GAMMA = ParameterSpec("gamma", Scope.MODEL, 0.01, 0.0, 1.0, search_low=0.0, search_high=0.05)

# density +- epsilon must stay inside (0, 1)
_DELLA_DENSITY = ParameterSpec(
    "density", Scope.MODEL, 1.0, 0.0, 1.0, search_low=0.2, search_high=0.8, search_default=True
)
_DELLA_EPSILON = ParameterSpec("epsilon", Scope.MODEL, 0.15, 0.0, 0.5, search_low=0.0, search_high=0.19)

_CHANGED = ParameterSpec("epsilon", Scope.GLOBAL, 1e-5, 0.0, search_low=0.0, search_high=1e-4)


def _task_vectors(
    name: str,
    paper: str,
    sparse: tuple[ParameterSpec, ...] = (),
    *,
    normalize: bool,
    rescale: bool | None,
    deterministic: bool = True,
    inert: tuple[ParameterSpec, ...] = (),
) -> MethodSpec:
    """A method of the task-vector family; `rescale` is None if it has no such parameter."""
    # with normalised weights only their ratios matter, so the search could not vary the length of the merged task vector
    switches = [ParameterSpec("normalize", Scope.GLOBAL, normalize, search_value=False)]
    if rescale is not None:
        switches.append(ParameterSpec("rescale", Scope.GLOBAL, rescale))
    return MethodSpec(
        name,
        (_WEIGHT, *sparse, _LAMBDA, *switches),
        BaseRole.REQUIRED,
        paper,
        deterministic=deterministic,
        inert=(_inert("int8_mask", False), *inert),
    )


_DARE, _BREADCRUMBS, _DELLA = "arXiv 2311.03099", "arXiv 2312.06795", "arXiv 2406.11617"

_ROWS = (
    MethodSpec(
        "linear",
        (_WEIGHT, ParameterSpec("normalize", Scope.GLOBAL, True)),
        BaseRole.SOURCE,
        "arXiv 2203.05482 (model soups)",
    ),
    _task_vectors(
        "task_arithmetic",
        "arXiv 2212.04089",
        normalize=False,
        rescale=None,
        inert=(_inert("density", 1.0), _inert("rescale", False)),
    ),
    _task_vectors("ties", "arXiv 2306.01708", (_DENSITY,), normalize=True, rescale=False),
    _task_vectors("dare_linear", _DARE, (_DENSITY,), normalize=False, rescale=True, deterministic=False),
    _task_vectors("dare_ties", _DARE, (_DENSITY,), normalize=False, rescale=True, deterministic=False),
    _task_vectors("breadcrumbs", _BREADCRUMBS, (_DENSITY, _GAMMA), normalize=False, rescale=False),
    _task_vectors("breadcrumbs_ties", _BREADCRUMBS, (_DENSITY, _GAMMA), normalize=False, rescale=False),
    _task_vectors("della", _DELLA, (_DELLA_DENSITY, _DELLA_EPSILON), normalize=True, rescale=True, deterministic=False),
    _task_vectors(
        "della_linear", _DELLA, (_DELLA_DENSITY, _DELLA_EPSILON), normalize=False, rescale=True, deterministic=False
    ),
    MethodSpec("slerp", (_T,), BaseRole.ENDPOINT, "Shoemake, SIGGRAPH 1985", max_sources=1),
    MethodSpec(
        "nuslerp",
        (
            _WEIGHT,
            ParameterSpec("nuslerp_row_wise", Scope.GLOBAL, False),
            ParameterSpec("nuslerp_flatten", Scope.GLOBAL, True),
        ),
        BaseRole.OPTIONAL,
        "mergekit (NuSLERP)",
        min_sources=2,
        max_sources=2,
    ),
    MethodSpec(
        "multislerp",
        (
            _WEIGHT,
            ParameterSpec("normalize_weights", Scope.GLOBAL, True),
            ParameterSpec("eps", Scope.GLOBAL, 1e-8, 0.0, above_low=True),
        ),
        BaseRole.OPTIONAL,
        "goddard.blog (Multi-SLERP)",
    ),
    MethodSpec(
        "karcher",
        (
            ParameterSpec("max_iter", Scope.GLOBAL, 10.0, 0.0, whole=True),
            ParameterSpec("tol", Scope.GLOBAL, 1e-5, 0.0, above_low=True),
        ),
        BaseRole.SOURCE,
        "arXiv 2603.04972",
    ),
    MethodSpec(
        "model_stock",
        (ParameterSpec("filter_wise", Scope.GLOBAL, False),),
        BaseRole.REQUIRED,
        "arXiv 2403.19522",
        min_sources=2,
    ),
    MethodSpec(
        "sce",
        (
            ParameterSpec(
                "select_topk", Scope.GLOBAL, 1.0, 0.0, 1.0, search_low=0.05, search_high=1.0, search_default=True
            ),
        ),
        BaseRole.REQUIRED,
        "arXiv 2408.07990",
        inert=(_inert("int8_mask", False),),
    ),
    MethodSpec("arcee_fusion", (), BaseRole.REQUIRED, "arcee.ai (Arcee Fusion)", max_sources=1),
    MethodSpec(
        "nearswap",
        (ParameterSpec("t", Scope.GLOBAL, None, 0.0, search_low=0.0, search_high=0.01, search_default=True),),
        BaseRole.REQUIRED,
        "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        max_sources=1,
    ),
    MethodSpec("ram", (_CHANGED,), BaseRole.REQUIRED, "arXiv 2601.13572"),
    MethodSpec(
        "ramplus_tl",
        (
            ParameterSpec("r", Scope.GLOBAL, 0.1, 0.0, search_low=0.0, search_high=0.5, search_default=True),
            ParameterSpec("alpha", Scope.GLOBAL, 0.2, 0.0, search_low=0.0, search_high=1.0, search_default=True),
            _CHANGED,
        ),
        BaseRole.REQUIRED,
        "arXiv 2601.13572",
    ),
    MethodSpec(
        "passthrough",
        (ParameterSpec("scale", Scope.MODEL, 1.0, search_low=0.5, search_high=1.5, search_default=True),),
        BaseRole.SOURCE,
        "mergekit",
        max_sources=1,
    ),
)

METHODS: Mapping[str, MethodSpec] = MappingProxyType({spec.name: spec for spec in _ROWS})
"""methods that a configuration or a mergekit file can name"""

PIECEWISE = MethodSpec("piecewise", (), BaseRole.SOURCE, "arXiv 2508.16204 (M2N2)")
"""weights that change along the flattened model (`Recipe.pieces`); produced by crossovers, not written by hand"""

SHIFTED_LINEAR = MethodSpec(
    "shifted_linear",
    (ParameterSpec("weight", Scope.MODEL, None), ParameterSpec("shift", Scope.GLOBAL, 0.0)),
    BaseRole.SOURCE,
    "arXiv 2403.13187 (scaled layer stacks)",
)
"""a weighted sum plus a constant, for scales folded into norms that compute with 1 + w; produced by stacks, not written by hand"""

_OWN = {spec.name: spec for spec in (PIECEWISE, SHIFTED_LINEAR)}


def method_spec(name: str) -> MethodSpec:
    """The specification of the method called `name`.

    Raises:
        RecipeError: there is no such method; suggests the closest name.
    """
    if name in _OWN:
        return _OWN[name]
    try:
        return METHODS[name]
    except KeyError:
        hint = did_you_mean(name, METHODS)
        raise RecipeError(f"unknown merge method {name!r}{hint} Known: {', '.join(sorted(METHODS))}") from None
