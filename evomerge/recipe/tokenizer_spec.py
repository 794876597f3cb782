"""`TokenizerSpec`: the vocabulary of a merged model, and the origin of individual token embeddings. Plain data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from evomerge.core import Json, RecipeError
from evomerge.recipe.values import mapping_of, optional_text, text_of, whole_number

UNION, BASE = "union", "base"
"""values of `TokenizerSpec.source` that are not models"""


@dataclass(frozen=True, slots=True)
class TokenRule:
    """The row of one token for models that do not have it.

    Attributes:
        model: key of the model whose row is used; None = zeros.
        token: the token of that model (its text or id) whose row is used; None = the token itself.
        force: use that row also for models that have the token.
    """

    model: str | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The vocabulary of a merged model; the rows of every source's embeddings are rearranged to it before merging.

    Attributes:
        source: "union" of all models' tokens, "base", the key of a model whose tokenizer is used, or a folder with another tokenizer.
        tokens: token -> rule; tokens that no tokenizer has are added.
        pad_to_multiple_of: pad the rows to a multiple of this, with the mean of all rows.
    """

    source: str = UNION
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise RecipeError(f"tokenizer: pad_to_multiple_of must be at least 1, got {self.pad_to_multiple_of}")

    def models(self) -> tuple[str, ...]:
        """Keys of the models it names."""
        named = [self.source] if self.source not in (UNION, BASE) else []
        return tuple(dict.fromkeys([*named, *(rule.model for rule in self.tokens.values() if rule.model is not None)]))

    def with_keys(self, key: Callable[[str], str]) -> "TokenizerSpec":
        """The same specification with `key` applied to every model's key."""
        tokens = {
            token: rule if rule.model is None else replace(rule, model=key(rule.model))
            for token, rule in self.tokens.items()
        }
        source = self.source if self.source in (UNION, BASE) else key(self.source)
        return replace(self, source=source, tokens=tokens)


def tokenizer_to_json(spec: TokenizerSpec | None) -> Json:
    """The inverse of `tokenizer_from_json`."""
    if spec is None:
        return None
    rules: dict[str, Json] = {
        token: {"model": rule.model, "token": rule.token, "force": rule.force} for token, rule in spec.tokens.items()
    }
    return {"source": spec.source, "tokens": rules, "pad_to_multiple_of": spec.pad_to_multiple_of}


def tokenizer_from_json(data: Json, where: str) -> TokenizerSpec | None:
    """Raise RecipeError naming a key that is missing, unknown or of the wrong type."""
    if data is None:
        return None
    fields = mapping_of(data, where, ("source", "tokens", "pad_to_multiple_of"), required=("source",))
    rules = fields.get("tokens", {})
    if not isinstance(rules, Mapping):
        raise RecipeError(f"{where}.tokens: expected an object, got {rules!r}")
    padding = fields.get("pad_to_multiple_of")
    return TokenizerSpec(
        text_of(fields["source"], f"{where}.source"),
        {token: _rule_from_json(rule, f"{where}.tokens[{token!r}]") for token, rule in rules.items()},
        None if padding is None else whole_number(padding, f"{where}.pad_to_multiple_of"),
    )


def _rule_from_json(data: Json, where: str) -> TokenRule:
    fields = mapping_of(data, where, ("model", "token", "force"), required=("model",))
    token, force = fields.get("token"), fields.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{where}.force: expected true or false, got {force!r}")
    if token is not None and not isinstance(token, str):
        token = whole_number(token, f"{where}.token")
    return TokenRule(optional_text(fields["model"], f"{where}.model"), token, force)
