"""The tokenizer of a merged model, built from those of its sources. transformers reads and writes them."""

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from evomerge.core import Json, RecipeError, loading_errors
from evomerge.plan import ModelHeader, check_tokenizer
from evomerge.plan.model_folder import has_tokenizer
from evomerge.recipe import Recipe, TokenizerSpec
from evomerge.recipe.tokenizer_spec import BASE, UNION

logger = logging.getLogger(__name__)

_TOKEN_ID_KEY = re.compile(r"\w+_token_(?:id|ids|index)|(?:begin_)?suppress_tokens|bad_words_ids")
"""settings whose value is a token id, a list of ids, or a list of words given as lists of ids"""

_LONGEST_REASON = 300
"""maximum number of characters quoted from transformers' error messages, which can be pages long"""


@dataclass(frozen=True, eq=False)
class MergedTokenizer:
    """A vocabulary and the vocabularies from which it was built.

    Attributes:
        ids: token -> id, in the order of the ids, which run from 0 without gaps.
        vocabularies: model -> (token -> row).
        owner: the model whose config the merged model has.
        tokenizer: the `transformers` tokenizer.
    """

    ids: Mapping[str, int]
    vocabularies: Mapping[str, Mapping[str, int]]
    owner: str
    tokenizer: Any

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`."""
        self.tokenizer.save_pretrained(folder)

    def translated(self, config: Mapping[str, Json]) -> dict[str, Json]:
        """A config of the owner with the new ids of its special tokens; tokens that no longer exist are left out."""
        tokens = {number: token for token, number in self.vocabularies[self.owner].items()}

        def translate(value: Json) -> Json:
            """The new id or word; None if a token no longer exists."""
            if isinstance(value, list):
                word = [translate(part) for part in value]
                return None if None in word else word
            return self.ids.get(tokens.get(value, "")) if isinstance(value, int) else None

        changed = dict(config)
        for key, value in config.items():
            if not _TOKEN_ID_KEY.fullmatch(key):
                continue
            if isinstance(value, list):
                changed[key] = [
                    new for new in map(translate, value) if new is not None
                ] or None  # transformers rejects an empty list
            elif value is not None:
                changed[key] = translate(value)
            if key == "eos_token_id" and value not in (None, []) and changed[key] in (None, []):
                logger.warning(
                    "tokenizer: the new vocabulary has no end-of-text token of %s, so answers will only end at their maximum length",
                    self.owner,
                )
        return changed


def build_tokenizer(spec: TokenizerSpec, recipe: Recipe, headers: Mapping[str, ModelHeader]) -> MergedTokenizer:
    """Build the tokenizer `spec` from those of the recipe's models. A model without one is assumed to have the owner's vocabulary, with a warning.

    Raises:
        RecipeError: a tokenizer cannot be read, or the merged one has gaps.
        CheckpointError: the owner, or the model whose tokenizer is used, has none.
    """
    owner = recipe.models()[0]
    without = [key for key in recipe.models() if key != owner and not has_tokenizer(headers[key].folder)]
    if without:
        logger.warning("%s: no tokenizer; its vocabulary is assumed to be that of %s", ", ".join(without), owner)
    loaded = {key: _load(headers[key].folder, headers[key].vocab_size) for key in recipe.models() if key not in without}
    source = owner if spec.source in (UNION, BASE) else spec.source
    vocabularies = {key: tokenizer.get_vocab() for key, tokenizer in loaded.items()}
    vocabularies |= dict.fromkeys(without, vocabularies[owner])
    # a folder that is not one of the models provides only its tokenizer
    merged = _copy(loaded[source] if source in loaded else _load(Path(source), None))
    if spec.source == UNION:
        for key, tokenizer in loaded.items():
            _add_missing(merged, tokenizer, vocabularies[key])
    known = merged.get_vocab()
    merged.add_tokens([token for token in spec.tokens if token not in known])
    ids = dict(sorted(merged.get_vocab().items(), key=lambda entry: entry[1]))
    if list(ids.values()) != list(range(len(ids))):
        gap = next(want for want, got in enumerate(ids.values()) if want != got)
        raise RecipeError(
            f"the tokenizer of {source} has no token with id {gap}, but tokens with larger ids, so it cannot be used for a merge"
        )
    return MergedTokenizer(ids, vocabularies, owner, merged)


def _load(folder: Path, n_rows: int | None) -> Any:
    check_tokenizer(folder)
    from transformers import AutoTokenizer

    with _of_folder(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return tokenizer if n_rows is None else _without_rowless_tokens(tokenizer, folder, n_rows)


@contextmanager
def _of_folder(folder: Path | str) -> Iterator[None]:
    """Convert the errors of transformers for the tokenizer of a folder.

    Raises:
        RecipeError: instead of transformers' errors.
    """
    try:
        yield
    except loading_errors() as problem:
        why = " ".join(str(problem).split())[:_LONGEST_REASON]
        raise RecipeError(f"{folder}: its tokenizer cannot be read: {why or type(problem).__name__}") from None


def _without_rowless_tokens(tokenizer: Any, folder: Path, n_rows: int) -> Any:
    """The tokenizer without tokens whose ids are beyond the embedding."""
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= n_rows}
    if not beyond:
        return tokenizer
    from tokenizers import Tokenizer

    content: dict[str, Any] = (
        json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    )
    if content["model"]["type"] != "BPE":
        raise RecipeError(
            f"{folder}: its tokenizer has {len(beyond)} tokens beyond the {n_rows} embedding rows, which can only be removed from "
            "byte-pair tokenizers; fix the tokenizer first"
        )
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in beyond]
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in beyond}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    model["merges"] = [pair for pair in pairs if not beyond & {*pair, "".join(pair)}]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def _copy(tokenizer: Any) -> Any:
    """A copy of the tokenizer, to which tokens can be added without changing the original."""
    with tempfile.TemporaryDirectory() as folder:
        with _of_folder(tokenizer.name_or_path):
            tokenizer.save_pretrained(folder)
        return _load(Path(folder), None)


def _add_missing(merged: Any, other: Any, vocabulary: Mapping[str, int]) -> None:
    """Add the tokens of `other` that `merged` lacks, in the order of their ids; special tokens keep their settings."""
    known = merged.get_vocab()
    added = {token.content: token for token in other.added_tokens_decoder.values()}
    missing = [token for token in sorted(vocabulary, key=lambda token: vocabulary[token]) if token not in known]
    # 8,000 tokens took 90 s one by one, and 0.04 s in one call
    for special, group in groupby(missing, lambda token: token in added and added[token].special):
        merged.add_tokens([added.get(token, token) for token in group], special_tokens=special)
