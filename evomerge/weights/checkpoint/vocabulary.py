"""A common vocabulary for models with different ones: the merged tokenizer, and every model's embedding rows rearranged to match it.

A token that a model lacks gets the base's row, else that of the only model that has it, else the mean of those that have it;
rules of the recipe take precedence. All arithmetic is in float32.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.core import RecipeError
from evomerge.plan import ModelHeader, TensorHeader, TensorKey, slices_with_inputs, split_into_modules
from evomerge.plan.model_header import is_embedding, is_head
from evomerge.recipe import BaseRole, Recipe, Slice, TokenizerSpec, TokenRule, method_spec
from evomerge.weights.checkpoint.tokenizers import MergedTokenizer, build_tokenizer
from evomerge.weights.mapping import ReadTensor

logger = logging.getLogger(__name__)

_MAY_HAVE_ROWS = re.compile(r"^(?!.*(pos|patch|wpe)).*(embed|head)")
"""names of tensors that may have a row for each token: embeddings other than position embeddings, and heads"""

_ROWS_AT_ONCE = 4096
"""number of rows that are rearranged at a time, which bounds the float32 copy"""

Row = tuple[str, int]
"""(model, row of its embedding)"""


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where the rows of one merged embedding come from.

    Attributes:
        own: model -> for each token of the merged vocabulary, its row in that model; -1 if it has none.
        lent: token id -> rows whose mean replaces missing ones; () = zeros.
    """

    own: Mapping[str, NDArray[np.int64]]
    lent: Mapping[int, tuple[Row, ...]]


@dataclass(frozen=True, eq=False)
class Alignment:
    """The embeddings of all models over one vocabulary.

    Attributes:
        tokenizer: of the merged model.
        n_rows: number of rows of the merged embeddings, including padding.
        rows: row maps of the input embedding and, if it is not tied, of the output layer.
    """

    tokenizer: MergedTokenizer
    n_rows: int
    rows: Mapping[str, RowMap]

    def concerns(self, tensor: str) -> bool:
        """Whether the tensor has a row for each token."""
        return _has_rows(tensor)

    def leaves(self, model: str, header: ModelHeader) -> bool:
        """Whether the embeddings of `model` are already in this order."""
        order = np.arange(len(self.tokenizer.ids))
        return header.vocab_size == self.n_rows and all(
            np.array_equal(rows.own[model], order) for rows in self.rows.values()
        )

    def headers(self, headers: Mapping[str, ModelHeader]) -> dict[str, ModelHeader]:
        """The headers of the rearranged models: with `n_rows` rows in every embedding."""
        return {key: replace(header, tensors=self._resized(header)) for key, header in headers.items()}

    def _resized(self, header: ModelHeader) -> dict[str, TensorHeader]:
        return {
            name: replace(tensor, shape=(self.n_rows, *tensor.shape[1:])) if self.concerns(name) else tensor
            for name, tensor in header.tensors.items()
        }

    def lenders(self, tensor: str) -> frozenset[str]:
        """The models that provide missing rows of the tensor, whether or not they contribute to it otherwise."""
        return frozenset(model for rows in self._rows_of(tensor).lent.values() for model, _ in rows)

    def aligned(self, keys: Sequence[TensorKey], read: ReadTensor) -> dict[TensorKey, torch.Tensor]:
        """The tensors with these keys (model, name), which are merged into one tensor, with their rows rearranged."""
        stored = {key: read(*key) for key in keys}
        name = keys[0][1]
        by_model = {model: tensor for (model, _), tensor in stored.items()}
        rows = self._rows_of(name)
        lent = _lent_rows(rows.lent, lambda model: by_model[model] if model in by_model else read(model, name))
        return {key: self._rearranged(tensor, rows.own[key[0]], lent) for key, tensor in stored.items()}

    def _rows_of(self, tensor: str) -> RowMap:
        return self.rows["head" if is_head(tensor) and "head" in self.rows else "embedding"]

    def _rearranged(
        self, tensor: torch.Tensor, own: NDArray[np.int64], lent: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        n_tokens = len(own)
        result = torch.zeros(self.n_rows, *tensor.shape[1:])
        for first in range(0, n_tokens, _ROWS_AT_ONCE):
            present = first + np.flatnonzero(own[first : first + _ROWS_AT_ONCE] >= 0)
            result[torch.from_numpy(present)] = tensor[torch.from_numpy(own[present])].float()
        for token in np.flatnonzero(own < 0).tolist():
            if token in lent:
                result[token] = lent[token]
        result[n_tokens:] = result[:n_tokens].mean(dim=0)
        return result


def _lent_rows(lent: Mapping[int, Sequence[Row]], tensor_of: Callable[[str], torch.Tensor]) -> dict[int, torch.Tensor]:
    """For each token, the mean of the rows that replace it, in float32. Needs one model's tensor at a time."""
    wanted: dict[str, list[tuple[int, int]]] = {}
    for token, rows in lent.items():
        for model, row in rows:
            wanted.setdefault(model, []).append((token, row))
    sums: dict[int, torch.Tensor] = {}
    for model, places in wanted.items():
        taken = tensor_of(model)[[row for _, row in places]].float()
        for (token, _), row in zip(places, taken, strict=True):
            sums[token] = sums[token] + row if token in sums else row
    return {token: total / len(lent[token]) for token, total in sums.items()}


def align(recipe: Recipe, headers: Mapping[str, ModelHeader]) -> Alignment | None:
    """The vocabulary that the recipe specifies; None if it specifies none. Raises as `alignment_to` does."""
    return None if recipe.tokenizer is None else alignment_to(recipe.tokenizer, recipe, headers)


def alignment_to(spec: TokenizerSpec, recipe: Recipe, headers: Mapping[str, ModelHeader]) -> Alignment:
    """The embeddings of the recipe's models over the vocabulary `spec`.

    Raises:
        RecipeError: a tokenizer cannot be read or merged, a rule cannot be applied, a model has unknown tensors with
            rows for tokens, or only some of the models tie their output layer.
    """
    kinds = {header.tied for header in headers.values()}
    if len(kinds) > 1:
        raise RecipeError(
            "tokenizer: some of the models tie their output layer to the embedding and some do not, so rows cannot be shared between them"
        )
    tokenizer = build_tokenizer(spec, recipe, headers)
    for key, header in headers.items():
        _check_embeddings(key, header, len(tokenizer.vocabularies[key]))
    n_tokens = len(tokenizer.ids)
    multiple = spec.pad_to_multiple_of or 1
    n_rows = -(-n_tokens // multiple) * multiple
    places = ("embedding",) if kinds == {True} else ("embedding", "head")
    maps = {
        place: _row_map(tokenizer, spec.tokens, recipe, _slice_of(recipe, place, headers), headers) for place in places
    }
    for place, rows in maps.items():
        zeros = [token for token, number in tokenizer.ids.items() if rows.lent.get(number) == ()]
        _warn_of_zeros(place, [token for token in zeros if token not in spec.tokens])
    return Alignment(tokenizer, n_rows, maps)


def _warn_of_zeros(place: str, tokens: Sequence[str]) -> None:
    if tokens:
        makes = "the output layer" if place == "head" else "the embedding"
        shown = ", ".join(map(repr, tokens[:5])) + (", ..." if len(tokens) > 5 else "")
        logger.warning(
            "tokenizer: no model that contributes to %s has these tokens, so their rows are zeros: %d, %s",
            *(makes, len(tokens), shown),
        )


def _check_embeddings(key: str, header: ModelHeader, n_tokens: int) -> None:
    """Refuse a model with rows for tokens in unknown tensors, which would keep the order of its own vocabulary."""
    advice = "leave the tokenizer out of the recipe and merge models with the same vocabulary"
    if header.embedding is None:
        raise RecipeError(f"tokenizer: the token embedding of {key} is not known; {advice}")
    for name, tensor in header.tensors.items():
        if not _has_rows(name) and _MAY_HAVE_ROWS.search(name) and tensor.shape and tensor.shape[0] >= n_tokens:
            raise RecipeError(
                f"tokenizer: tensor {name!r} of {key} seems to have a row for each token ({tensor.shape[0]} rows), but evomerge does not know "
                f"how to rearrange it; {advice}"
            )


def _has_rows(tensor: str) -> bool:
    return is_embedding(tensor) or is_head(tensor)


def _slice_of(recipe: Recipe, place: str, headers: Mapping[str, ModelHeader]) -> Slice:
    """The slice that produces the embedding (the first of its module) or the output layer (the last)."""
    slices = slices_with_inputs(recipe)
    header = headers[recipe.models()[0]]
    tensor = header.head if place == "head" and header.head is not None else header.embedding
    modules = split_into_modules(tuple(header.tensors), [part.module for part in slices])
    module = next(module for module, names in modules.items() if tensor in names)
    return [part for part in slices if part.module == module][-1 if place == "head" else 0]


def _row_map(
    tokenizer: MergedTokenizer,
    rules: Mapping[str, TokenRule],
    recipe: Recipe,
    part: Slice,
    headers: Mapping[str, ModelHeader],
) -> RowMap:
    """Raise RecipeError if a rule cannot be applied."""
    base = recipe.base_of(part)
    keys = [source.key for source in part.sources]
    needed = [base] if base is not None and method_spec(recipe.method).base is not BaseRole.SOURCE else []
    models = tuple(dict.fromkeys(keys + needed))
    own = {model: _own_rows(tokenizer, model, headers[model]) for model in models}
    lent: dict[int, tuple[Row, ...]] = {}
    for token, number in tokenizer.ids.items():
        owners = [(model, int(own[model][number])) for model in models if own[model][number] >= 0]
        rule = rules.get(token)
        if rule is not None and (rule.force or len(owners) < len(models)):
            lent[number] = _lent_by_rule(token, rule, tokenizer, own, headers)
            if rule.force:
                for rows in own.values():
                    rows[number] = -1
        elif len(owners) < len(models):
            of_base = [row for row in owners if row[0] == base]
            lent[number] = tuple(of_base or owners)
    return RowMap(own, lent)


def _own_rows(tokenizer: MergedTokenizer, model: str, header: ModelHeader) -> NDArray[np.int64]:
    vocabulary = tokenizer.vocabularies[model]
    n_rows = header.vocab_size or 0
    rows = [vocabulary.get(token, -1) for token in tokenizer.ids]
    return np.array([row if row < n_rows else -1 for row in rows], np.int64)


def _lent_by_rule(
    token: str,
    rule: TokenRule,
    tokenizer: MergedTokenizer,
    own: Mapping[str, NDArray[np.int64]],
    headers: Mapping[str, ModelHeader],
) -> tuple[Row, ...]:
    if rule.model is None:
        return ()
    where = f"tokenizer.tokens[{token!r}]"
    if rule.model not in own:
        raise RecipeError(
            f"{where}: {rule.model} must be a source of the embedding (the first slice) or of the output layer (the last slice) to provide "
            f"a row; their sources are {', '.join(own)}"
        )
    wanted = token if rule.token is None else rule.token
    row = wanted if isinstance(wanted, int) else tokenizer.vocabularies[rule.model].get(wanted, -1)
    n_rows = headers[rule.model].vocab_size or 0
    if not 0 <= row < n_rows:
        raise RecipeError(f"{where}: {rule.model} has no embedding for {wanted!r} (it has {n_rows} rows)")
    return ((rule.model, row),)
