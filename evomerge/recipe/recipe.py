"""`Recipe`: everything that determines a merged model, as plain data.

Knows nothing of tensors, files on disk or searches. Its structure is mergekit's (slices of sources with parameters at four
levels), so every recipe that has a mergekit form writes and reads back unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from evomerge.core import Json, fingerprint

ParameterValue = float | bool | str


@dataclass(frozen=True, slots=True)
class Setting:
    """One conditional value of a parameter.

    Attributes:
        value: a scalar, or a gradient over depth (a tuple, interpolated linearly over the slice's layers).
        filter: substring of the tensor names it holds for; None or "*" = all.
    """

    value: ParameterValue | tuple[float, ...]
    filter: str | None = None


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
        dtype: what the arithmetic runs in; None = float32 (evomerge's default, mergekit's too where a recipe is silent).
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

    def to_json(self) -> dict[str, Json]:
        """A lossless JSON form; `from_json` reverses it."""
        raise NotImplementedError

    @staticmethod
    def from_json(data: Mapping[str, Json]) -> "Recipe":
        """Reads what `to_json` wrote.

        Raises:
            RecipeError: a missing, unknown or ill-typed key, named.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Equal for recipes that give the same weights from the same model folders; `name` does not count."""
        return fingerprint({key: value for key, value in self.to_json().items() if key != "name"})
