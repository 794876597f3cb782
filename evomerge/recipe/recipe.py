"""`Recipe`: everything that determines a merged model, as plain data.

Knows nothing of tensors, files or searches. Its structure is mergekit's (slices of sources with parameters at four
levels), so every recipe that has a mergekit form can be written and read back unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from evomerge.core import Json, RecipeError, fingerprint
from evomerge.recipe.parts import Parameters, Slice, Source
from evomerge.recipe.pieces import PieceTable
from evomerge.recipe.recipe_json import (
    FORMAT_VERSION,
    parameters_from_json,
    parameters_to_json,
    slices_from_json,
    slices_to_json,
)
from evomerge.recipe.tokenizer_spec import TokenizerSpec, tokenizer_from_json, tokenizer_to_json
from evomerge.recipe.values import mapping_of, optional_text, text_of, whole_number

DTYPES = ("bfloat16", "float16", "float32")
"""Supported types of the arithmetic and of the written weights."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge.

    Attributes:
        method: a name of `METHODS`, or one of evomerge's own ("piecewise", "shifted_linear").
        base: key of the base model; None if the method takes none, or if every slice has its own.
        slices: output layers in order; a single slice whose sources have no `layer_range` is a whole-model merge.
        parameters: global settings.
        dtype: type of the arithmetic; None = float32 ("float32" is stored as None). mergekit computes in the sources' dtype by
            default; evomerge does not, because that costs quality.
        out_dtype: type of the written weights, e.g. "bfloat16"; None = `dtype`, or without it that of the base (else of the first source).
        seed: of the random masks of stochastic methods.
        tokenizer: the vocabulary of the result; None = all models have the same, and the tokenizer is copied from the base (else the
            first source).
        name: a label that does not affect the weights.
        pieces: the weights of method "piecewise"; None for all others.
        chat_template: "auto" (the one of most models), the name of a built-in template, or Jinja text; None = the tokenizer's own.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    tokenizer: TokenizerSpec | None = None
    name: str | None = None
    pieces: PieceTable | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        for label, dtype in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if dtype is not None and dtype not in DTYPES:
                raise RecipeError(f"recipe: unknown {label} {dtype!r}; known: {', '.join(DTYPES)}")
        if self.dtype == "float32":
            object.__setattr__(self, "dtype", None)
        if not self.slices or not all(part.sources for part in self.slices):
            raise RecipeError("recipe: expected at least one slice with at least one source")
        for parts in self.modules().values():
            whole = [source.layer_range is None for part in parts for source in part.sources]
            if any(whole) and (len(parts) > 1 or not all(whole)):
                raise RecipeError(
                    "recipe: a source without layer_range is a whole model, so all sources must be whole models in one slice"
                )
        if any(part.base is not None and part.sources[0].layer_range is None for part in self.slices):
            raise RecipeError("recipe: only a slice of layers can have its own base, not a merge of whole models")
        if any(part.base is not None and part.base == self.base for part in self.slices):
            own = (replace(part, base=None) if part.base == self.base else part for part in self.slices)
            object.__setattr__(self, "slices", tuple(own))
        if None in self.modules() and len(self.modules()) > 1:
            raise RecipeError("recipe: either all slices or none must belong to a module")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of all slices, in order."""
        return tuple(source for part in self.slices for source in part.sources)

    @property
    def whole_model(self) -> bool:
        """Whether the sources are whole models (mergekit's `models:` form), in every module."""
        return all(source.layer_range is None for source in self.sources)

    def modules(self) -> dict[str | None, tuple[Slice, ...]]:
        """Module -> its slices, in the recipe's order; a recipe without modules has a single one, None."""
        names = dict.fromkeys(part.module for part in self.slices)
        return {name: tuple(part for part in self.slices if part.module == name) for name in names}

    def base_of(self, part: Slice) -> str | None:
        """Key of the base model of one of the recipe's slices."""
        return self.base if part.base is None else part.base

    def models(self) -> tuple[str, ...]:
        """Keys of every model whose weights the recipe reads, base first, each once."""
        keys = [self.base, *(source.key for source in self.sources), *(part.base for part in self.slices)]
        return tuple(dict.fromkeys(key for key in keys if key is not None))

    def source(self, key: str) -> Source:
        """The first source with this key; for a base that is not among the sources, `key` is its path."""
        return next((source for source in self.sources if source.key == key), Source(key))

    def filters(self) -> tuple[str, ...]:
        """The text of every filter of a setting, each once, in order of appearance."""
        levels = [self.parameters, *(part.parameters for part in self.slices)]
        levels += [source.parameters for source in self.sources]
        texts = (setting.filter for level in levels for settings in level.values() for setting in settings)
        return tuple(dict.fromkeys(text for text in texts if text is not None and text != "*"))

    def to_json(self) -> dict[str, Json]:
        """A lossless JSON form; `from_json` reverses it."""
        return {
            "version": FORMAT_VERSION,
            "method": self.method,
            "slices": slices_to_json(self.slices),
            "base": self.base,
            "parameters": parameters_to_json(self.parameters),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "seed": self.seed,
            "tokenizer": tokenizer_to_json(self.tokenizer),
            "name": self.name,
            **({} if self.pieces is None else {"pieces": self.pieces.to_json()}),
            "chat_template": self.chat_template,
        }

    @staticmethod
    def from_json(data: Mapping[str, Json]) -> "Recipe":
        """Read what `to_json` wrote.

        Raises:
            RecipeError: names a key that is missing, unknown or of the wrong type.
        """
        known = ("version", "tokenizer_source", *Recipe.__dataclass_fields__)
        fields = mapping_of(data, "recipe", known, required=("method", "slices"))
        version = fields.get("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise RecipeError(
                f"recipe: format version {version!r}; this evomerge reads version {FORMAT_VERSION}: upgrade evomerge"
            )
        texts = {
            key: optional_text(fields.get(key), f"recipe {key}")
            for key in ("base", "dtype", "out_dtype", "name", "chat_template", "tokenizer_source")
        }
        # recipes of evomerge 0.1 had a key for the model that the tokenizer comes from
        source = texts.pop("tokenizer_source")
        tokenizer = fields.get("tokenizer", None if source is None else {"source": source})
        return Recipe(
            method=text_of(fields["method"], "recipe method"),
            slices=slices_from_json(fields["slices"], "recipe slices"),
            parameters=parameters_from_json(fields.get("parameters", {}), "recipe parameters"),
            seed=whole_number(fields.get("seed", 0), "recipe seed"),
            tokenizer=tokenizer_from_json(tokenizer, "recipe tokenizer"),
            pieces=None if fields.get("pieces") is None else PieceTable.from_json(fields["pieces"]),
            **texts,
        )

    def fingerprint(self) -> str:
        """Equal for recipes that give the same weights from the same model folders; ignores `name`."""
        return fingerprint({key: value for key, value in self.to_json().items() if key != "name"})
