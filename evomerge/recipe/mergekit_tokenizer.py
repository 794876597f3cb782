"""mergekit's `tokenizer_source:` and `tokenizer:` -> `TokenizerSpec`, and back. Knows the format, but nothing of tokenizers."""

from collections.abc import Mapping
from typing import Any

from evomerge.core import RecipeError
from evomerge.recipe.mergekit_fields import model_reference, reference_of
from evomerge.recipe.parts import Source
from evomerge.recipe.tokenizer_spec import BASE, UNION, TokenizerSpec, TokenRule
from evomerge.recipe.values import mapping_of, text_of, whole_number


def read_tokenizer(fields: Mapping[str, Any], where: str) -> TokenizerSpec | None:
    """The tokenizer that the document's fields describe; None if they do not mention it.

    Raises:
        RecipeError: both keys are given, a key is unknown, or a value has the wrong type.
    """
    source, full = fields.get("tokenizer_source"), fields.get("tokenizer")
    if source is not None and full is not None:
        raise RecipeError(f"{where}: give one of 'tokenizer_source' and 'tokenizer'")
    if source is not None:
        return TokenizerSpec(_source(source, f"{where}: tokenizer_source"))
    if full is None:
        return None
    place = f"{where}: tokenizer"
    keys = mapping_of(full, place, ("source", "tokens", "pad_to_multiple_of"))
    padding = keys.get("pad_to_multiple_of")
    tokens = keys.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise RecipeError(f"{place}.tokens: expected a mapping of tokens, got {tokens!r}")
    return TokenizerSpec(
        _source(keys.get("source") or UNION, f"{place}.source"),
        {str(token): _rule(rule, f"{place}.tokens[{token!r}]") for token, rule in tokens.items()},
        None if padding is None else whole_number(padding, f"{place}.pad_to_multiple_of"),
    )


def write_tokenizer(spec: TokenizerSpec, sources: Mapping[str, Source]) -> dict[str, Any]:
    """The document's keys for `spec`; `sources` are the recipe's models by key."""

    def model(key: str) -> Any:
        return reference_of(sources.get(key, Source(key)))

    source = spec.source if spec.source in (UNION, BASE) else model(spec.source)
    if not spec.tokens and spec.pad_to_multiple_of is None:
        return {"tokenizer_source": source}
    full: dict[str, Any] = {"source": source}
    if spec.tokens:
        full["tokens"] = {token: _written_rule(rule, model) for token, rule in spec.tokens.items()}
    if spec.pad_to_multiple_of is not None:
        full["pad_to_multiple_of"] = spec.pad_to_multiple_of
    return {"tokenizer": full}


def _source(data: Any, where: str) -> str:
    return data if data in (UNION, BASE) else model_reference(data, where).key


def _rule(data: Any, where: str) -> TokenRule:
    fields = mapping_of(data, where, ("source", "force"))
    force = fields.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{where}.force: expected true or false, got {force!r}")
    source = fields.get("source")
    if isinstance(source, Mapping) and "kind" in source:
        keys = mapping_of(source, f"{where}.source", ("kind", "model", "token", "token_id"))
        kind = keys["kind"]
        if kind == "zero":
            return TokenRule(None, None, force)
        if kind != "model_token":
            raise RecipeError(f"{where}.source.kind: expected 'zero' or 'model_token', got {kind!r}")
        token, number = keys.get("token"), keys.get("token_id")
        if (token is None) == (number is None):
            raise RecipeError(f"{where}.source: give exactly one of 'token' and 'token_id'")
        model = model_reference(keys.get("model"), f"{where}.source.model").key
        if token is None:
            return TokenRule(model, whole_number(number, f"{where}.source.token_id", least=0), force)
        return TokenRule(model, text_of(token, f"{where}.source.token"), force)
    if source is None:
        raise RecipeError(f"{where}: 'source' is missing: a model, {{kind: model_token, ...}} or {{kind: zero}}")
    return TokenRule(model_reference(source, f"{where}.source").key, None, force)


def _written_rule(rule: TokenRule, model: Any) -> dict[str, Any]:
    source: Any
    if rule.model is None:
        source = {"kind": "zero"}
    elif rule.token is None:
        source = model(rule.model)
    else:
        named = {"token": rule.token} if isinstance(rule.token, str) else {"token_id": rule.token}
        source = {"kind": "model_token", "model": model(rule.model)} | named
    return {"source": source} | ({"force": True} if rule.force else {})
