"""Copies of models with a common vocabulary, which a search needs. Each copy is a merge to which the other models only contribute embedding rows."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.build.commands.given_models import default_name, parse_model, resolve_hub_models, sources_by_name
from evomerge.build.commands.merging import merge_recipe
from evomerge.config import check_expert_name
from evomerge.core import ConfigError, FilePath, parse_bytes
from evomerge.plan import ModelHeader, chat_template_of, make_plan, read_headers
from evomerge.plan.model_header import FLOAT_DTYPES
from evomerge.recipe import Recipe, Setting, Slice, Source, TokenizerSpec, naming
from evomerge.recipe.tokenizer_spec import BASE, UNION


@dataclass(frozen=True, slots=True)
class AlignedModels:
    """Models with a common vocabulary.

    Attributes:
        base: the base; None if there is none.
        experts: name -> model.
        copied: the models that were copied; the others already had the vocabulary.
        n_tokens: size of the vocabulary.
        n_rows: number of embedding rows.
    """

    base: Source | None
    experts: Mapping[str, Source]
    copied: Sequence[Source]
    n_tokens: int
    n_rows: int

    def lines(self) -> list[str]:
        """What was done and what to do next, as lines for the user."""
        models = [*([self.base] if self.base else []), *self.experts.values()]
        done = [f"{model.key}: {'written' if model in self.copied else 'unchanged'}" for model in models]
        words = ["evomerge init"]
        for name, model in self.experts.items():
            words.append(shlex.quote(model.key if name == default_name(model) else f"{name}={model.key}"))
        if self.base is not None:
            words.append(f"--base {shlex.quote(self.base.key)}")
        return [*done, f"{self.n_tokens} tokens, {self.n_rows} embedding rows", f"next: {' '.join(words)}"]


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
    """Write a copy of each model with its embedding rows in the order of a common vocabulary, as `out`/NAME.

    Weights keep their values; a model with several dtypes becomes float32. Tokens that a model lacks get rows as in merges with a `tokenizer`
    (docs/merge-methods.md). Copies have the config of the base (without a base: of the first model) and the same tokenizer, but keep their
    own chat templates. Models that already have the vocabulary and the number of rows are not copied.

    Args:
        experts: folders of models, as `path` or `name=path`; `path+lora` is a model with an adapter, which is merged in its copy.
        out: the folder of the copies.
        base: the model they were all trained from.
        tokenizer: "union" of all models' tokens, "base" (without a base: the first model's), a model's name, or a folder with a tokenizer.
        pad_to_multiple_of: round the number of rows up to a multiple of this; None = as many as the base has (for a union: the largest model).
        max_memory: limit for all tensors in memory at a time, in bytes or as a string; None = a few tensors.
        overwrite: replace existing copies.

    Raises:
        ConfigError: there are too few models, two have the same name, or a name is not valid for an expert.
        RecipeError: the models are incompatible, a tokenizer cannot be read or combined with the others, or a copy already exists.
        CheckpointError: a model is damaged, or the disk is full.
    """
    out = Path(out)
    sources = sources_by_name([*([("", Source(str(base)))] if base else []), *map(parse_model, experts)])
    if len(sources) < 2:
        raise ConfigError("name at least two models, or one and its --base")
    if max_memory is not None:
        max_memory = parse_bytes(max_memory, "max memory")
    first, *_ = sources
    models = _checked(
        {name: resolve_hub_models(source).moved(_absolute) for name, source in sources.items()}, first if base else None
    )
    joint = _linear(models.values(), models[first].key if base else None)
    headers = read_headers(joint)

    # takes seconds, so names are checked first
    from evomerge.weights import alignment_to, check_target

    spec = TokenizerSpec(_vocabulary(tokenizer, models), {}, pad_to_multiple_of)
    alignment = alignment_to(spec, joint, headers)
    n_rows = _rows_with_padding(spec, models[first].key, headers)
    if pad_to_multiple_of is None and n_rows > alignment.n_rows:
        spec, alignment = replace(spec, pad_to_multiple_of=n_rows), replace(alignment, n_rows=n_rows)
    make_plan(joint, alignment.headers(headers))
    copies = {name: out / name for name, model in models.items() if not alignment.leaves(model.key, headers[model.key])}
    recipes = {name: _copying(models[name], models, spec, joint.base, headers) for name in copies}
    for folder in copies.values():
        check_target(folder, headers, overwrite)
    for name, folder in copies.items():
        merge_recipe(recipes[name], folder, max_memory=max_memory, overwrite=overwrite)
    placed = {name: Source(str(copies[name])) if name in copies else source for name, source in sources.items()}
    return AlignedModels(
        base=placed[first] if base else None,
        experts={name: source for name, source in placed.items() if not (base and name == first)},
        copied=[placed[name] for name in copies],
        n_tokens=len(alignment.tokenizer.ids),
        n_rows=alignment.n_rows,
    )


def _absolute(path: str) -> str:
    """An absolute path, since recipes in the copies' folders are read from anywhere; keeps "..", which cannot be resolved after a symbolic link."""
    return str(Path(path).absolute())


def _checked(models: Mapping[str, Source], base: str | None) -> Mapping[str, Source]:
    """Return the models; raise ConfigError if the name of an expert is not valid in a search, or two of them are the same model."""
    seen: dict[str, str] = {}
    for name, model in models.items():
        if name != base:
            try:
                check_expert_name(name)
            except ValueError as problem:
                raise ConfigError(f"{problem}; give it a name, e.g. first={model.key}") from None
        if model.key in seen:
            raise ConfigError(f"{seen[model.key]!r} and {name!r} are the same model, {model.key}; remove one of them")
        seen[model.key] = name
    return models


def _linear(models: Collection[Source], base: str | None, *, alone: Source | None = None) -> Recipe:
    """A sum of the models; with `alone`, the others have weight 0 and only contribute rows."""
    sources = (replace(model, parameters={"weight": (Setting(float(alone in (None, model))),)}) for model in models)
    return Recipe("linear", (Slice(tuple(sources)),), base=base)


def _copying(
    model: Source,
    models: Mapping[str, Source],
    tokenizer: TokenizerSpec,
    base: str | None,
    headers: Mapping[str, ModelHeader],
) -> Recipe:
    """The merge that copies `model`. Raises RecipeError if its chat template is not valid Jinja."""
    from evomerge.weights import chosen_template

    header = headers[model.key]
    template = chat_template_of(header)
    if template is not None:
        with naming(model.key):
            chosen_template(template, headers)
    recipe = _linear(models.values(), base, alone=model)
    return replace(recipe, tokenizer=tokenizer, out_dtype=_dtype_of_all(header), chat_template=template)


def _vocabulary(given: str, models: Mapping[str, Source]) -> str:
    """The source of the `TokenizerSpec` for the value of `--tokenizer`."""
    if given in (UNION, BASE):
        return given
    if given in models:
        return models[given].key
    if not Path(given).is_dir():
        raise ConfigError(
            f"tokenizer {given!r}: expected union, base, the name of a model ({', '.join(models)}), or a folder with a tokenizer"
        )
    return _absolute(given)


def _rows_with_padding(spec: TokenizerSpec, first: str, headers: Mapping[str, ModelHeader]) -> int:
    """The number of embedding rows including padding: of the largest model for a union, otherwise of the model with the vocabulary."""
    of_model = {key: header.vocab_size or 0 for key, header in headers.items()}
    if spec.source == UNION:
        return max(of_model.values())
    return of_model.get(first if spec.source == BASE else spec.source, 0)


def _dtype_of_all(header: ModelHeader) -> str:
    """The dtype that holds every weight of the model exactly: its own, or float32 if it has several."""
    found = {FLOAT_DTYPES[tensor.dtype] for tensor in header.tensors.values() if tensor.dtype in FLOAT_DTYPES}
    return found.pop() if len(found) == 1 else "float32"
