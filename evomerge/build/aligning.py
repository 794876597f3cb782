"""Copies of models with one vocabulary, which a search needs. Each copy is a merge in which the other models only lend rows."""

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.build.models import merge_recipe
from evomerge.build.starting import default_name, found, named, named_source, refuse_existing
from evomerge.core import ConfigError, FilePath
from evomerge.plan import chat_template_of, make_plan, read_headers
from evomerge.recipe import Recipe, Setting, Slice, Source, TokenizerSpec


@dataclass(frozen=True, slots=True)
class AlignedModels:
    """Where models with one vocabulary are.

    Attributes:
        base: the base, None where there is none.
        experts: name -> model.
        copied: those that were copied; the others had the vocabulary already.
        n_tokens: of the vocabulary.
        n_rows: of the embeddings.
    """

    base: Source | None
    experts: Mapping[str, Source]
    copied: Sequence[Source]
    n_tokens: int
    n_rows: int

    def lines(self) -> list[str]:
        """What was done, and what comes next, as it is told to a user."""
        models = [*([self.base] if self.base else []), *self.experts.values()]
        told = [f"{model.key}: {'written' if model in self.copied else 'unchanged'}" for model in models]
        words = ["evomerge init"]
        for name, model in self.experts.items():
            words.append(shlex.quote(model.key if name == default_name(model) else f"{name}={model.key}"))
        if self.base is not None:
            words.append(f"--base {shlex.quote(self.base.key)}")
        return [*told, f"{self.n_tokens} tokens, {self.n_rows} embedding rows", f"next: {' '.join(words)}"]


def align_models(
    experts: Sequence[str],
    out: FilePath,
    *,
    base: FilePath | None = None,
    tokenizer: str = "union",
    pad_to_multiple_of: int | None = None,
    max_memory: str | int | None = None,
    overwrite: bool = False,
) -> AlignedModels:
    """Writes a copy of each model, with its embedding rows in the order of one vocabulary, as `out`/NAME.

    Weights keep their values and dtypes, tokens that a model lacks get rows as in merges with a `tokenizer` (docs/merge-methods.md).
    Copies have the config of the base (without one, of the first model) and the same tokenizer, but for a chat template of their own.
    Models that have the vocabulary already are not copied.

    Args:
        experts: folders of models, as `path` or `name=path`; `path+lora` is a model with an adapter, whose copy has it merged.
        out: the folder of the copies.
        base: the model they were all trained from.
        tokenizer: "union" of all models' tokens, "base" (without one, of the first model), a model's name, or a folder with a tokenizer.
        pad_to_multiple_of: rows are added up to a multiple of this.
        max_memory: of all tensors in memory at a time, in bytes or as text; None = a few tensors.
        overwrite: replace copies that are there.

    Raises:
        ConfigError: too few models, two of one name, or a copy is there already.
        RecipeError: the models do not fit each other, or a tokenizer cannot be read or joined.
        CheckpointError: a model is damaged, or the disk has no room.
    """
    out = Path(out)
    sources = named([*([("", Source(str(base)))] if base else []), *map(named_source, experts)])
    if len(sources) < 2:
        raise ConfigError("name at least two models, or one and its --base")
    # absolute, as the recipes in the copies' folders are read anywhere
    models = {name: found(source).moved(os.path.abspath) for name, source in sources.items()}
    spec = TokenizerSpec(_vocabulary(tokenizer, models), {}, pad_to_multiple_of)
    first, *_ = models
    joint = _linear(models.values(), models[first].key if base else None, spec)
    headers = read_headers(joint)

    # seconds of work, for which wrong names do not wait
    from evomerge.weights import alignment_to

    alignment = alignment_to(spec, joint, headers)
    make_plan(joint, alignment.headers(headers))
    copies = {name: out / name for name, model in models.items() if not alignment.leaves(model.key, headers[model.key])}
    for folder in copies.values():
        refuse_existing(folder, overwrite=overwrite)
    for name, folder in copies.items():
        header = headers[models[name].key]
        recipe = _linear(models.values(), joint.base, spec, alone=models[name])
        recipe = replace(recipe, out_dtype=header.dtype, chat_template=chat_template_of(header))
        merge_recipe(recipe, folder, max_memory=max_memory, overwrite=overwrite)
    placed = {name: Source(str(copies[name])) if name in copies else source for name, source in sources.items()}
    return AlignedModels(
        base=placed[first] if base else None,
        experts={name: source for name, source in placed.items() if not (base and name == first)},
        copied=[placed[name] for name in copies],
        n_tokens=len(alignment.tokenizer.ids),
        n_rows=alignment.n_rows,
    )


def _linear(
    models: Collection[Source], base: str | None, tokenizer: TokenizerSpec, *, alone: Source | None = None
) -> Recipe:
    """A sum of the models over the joint vocabulary; of `alone`, the others have no weight, and lend rows."""
    sources = (replace(model, parameters={"weight": (Setting(float(alone in (None, model))),)}) for model in models)
    return Recipe("linear", (Slice(tuple(sources)),), base=base, tokenizer=tokenizer)


def _vocabulary(given: str, models: Mapping[str, Source]) -> str:
    """The source of a `TokenizerSpec` that `--tokenizer` means."""
    if given in ("union", "base"):
        return given
    if given in models:
        return models[given].key
    if not Path(given).is_dir():
        raise ConfigError(
            f"tokenizer {given!r}: expected union, base, the name of a model ({', '.join(models)}), or a folder with a tokenizer"
        )
    return os.path.abspath(given)
