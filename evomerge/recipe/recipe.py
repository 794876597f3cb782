"""`Recipe`: everything that determines a merged model, as plain data.

Knows nothing of tensors, files on disk or searches. Its structure is mergekit's (slices of sources with parameters at four
levels), so every recipe that has a mergekit form writes and reads back unchanged.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from evomerge.core import Json, RecipeError, fingerprint

ParameterValue = float | bool | str

DTYPES = ("bfloat16", "float16", "float32")
"""What arithmetic can run in and weights can be written as."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One conditional value of a parameter.

    Attributes:
        value: a scalar, or a gradient over depth (a tuple, interpolated linearly over the slice's layers).
        filter: substring of the tensor names it holds for; None or "*" = all.
    """

    value: ParameterValue | tuple[float, ...]
    filter: str | None = None

    def __post_init__(self) -> None:
        if self.filter == "":  # in every name, as "*"
            object.__setattr__(self, "filter", None)
        if isinstance(self.value, tuple):
            if not self.value:
                raise RecipeError("a parameter's gradient is an empty list; give at least one number")
            object.__setattr__(self, "value", tuple(_finite(entry) for entry in self.value))
        elif not isinstance(self.value, bool | str):
            object.__setattr__(self, "value", _finite(self.value))


Parameters = Mapping[str, tuple[Setting, ...]]
"""parameter name -> settings in order; the first whose filter matches wins, no match falls through to the next level"""


@dataclass(frozen=True, slots=True)
class Source:
    """One model (or a range of its layers) in a slice.

    Attributes:
        model: a folder (later also a hub id).
        layer_range: layers [first, last) of the model; None = all of them (mergekit's `models:` form).
        parameters: settings for this source alone.
        revision: pinned hub revision.
        lora: adapter folder merged into the model before anything else.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    revision: str | None = None
    lora: str | None = None

    def __post_init__(self) -> None:
        if self.layer_range is not None:
            first, last = self.layer_range
            if not 0 <= first < last:
                raise RecipeError(f"layer_range [{first}, {last}] of {self.model}: expected 0 <= first < last")

    @property
    def key(self) -> str:
        """What plans and weight pools call this model: mergekit's `model@revision+lora`."""
        return self.model + (f"@{self.revision}" if self.revision else "") + (f"+{self.lora}" if self.lora else "")


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive output layers made from the same ranges of sources."""

    sources: tuple[Source, ...]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge.

    Attributes:
        method: a name of `METHODS`.
        base: the base model's folder; None where the method takes none.
        slices: output layers in order; a single slice whose sources have no `layer_range` is a whole-model merge.
        parameters: global settings.
        dtype: what the arithmetic runs in; None = float32, which is stored as None ("float32" reads back as None). mergekit
            computes in the sources' dtype where a recipe is silent; evomerge does not, since that costs quality.
        out_dtype: what is written, e.g. "bfloat16"; None = the base's (else the first source's) dtype.
        seed: keys the random masks of stochastic methods.
        tokenizer_source: where the tokenizer is copied from; None = base, else the first source.
        name: a label that does not affect the weights.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    tokenizer_source: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for label, dtype in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if dtype is not None and dtype not in DTYPES:
                raise RecipeError(f"recipe: unknown {label} {dtype!r}; known: {', '.join(DTYPES)}")
        if self.dtype == "float32":
            object.__setattr__(self, "dtype", None)
        if not self.slices or not all(piece.sources for piece in self.slices):
            raise RecipeError("recipe: expected at least one slice with at least one source")
        whole = [source.layer_range is None for piece in self.slices for source in piece.sources]
        if any(whole) and (len(self.slices) > 1 or not all(whole)):
            raise RecipeError(
                "recipe: a source without layer_range is a whole model, so all sources must be whole models in one slice"
            )

    @property
    def whole_model(self) -> bool:
        """Whether the sources are whole models (mergekit's `models:` form)."""
        return self.slices[0].sources[0].layer_range is None

    def models(self) -> tuple[str, ...]:
        """Keys of every model that the recipe reads, base first, each once."""
        keys = [source.key for piece in self.slices for source in piece.sources]
        return tuple(dict.fromkeys([self.base, *keys] if self.base is not None else keys))

    def to_json(self) -> dict[str, Json]:
        """A lossless JSON form; `from_json` reverses it."""
        from evomerge.recipe.recipe_json import recipe_to_json

        return recipe_to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Json]) -> "Recipe":
        """Reads what `to_json` wrote.

        Raises:
            RecipeError: a missing, unknown or ill-typed key, named.
        """
        from evomerge.recipe.recipe_json import recipe_from_json

        return recipe_from_json(data)

    def fingerprint(self) -> str:
        """Equal for recipes that give the same weights from the same model folders; `name` does not count."""
        return fingerprint({key: value for key, value in self.to_json().items() if key != "name"})


def _finite(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"a parameter's value must be a finite number, got {value!r}")
    return float(value)
