"""`merge_to_folder`: writes a recipe's result as a complete Hugging Face model folder, or nothing at all."""

import logging
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evomerge.core import CheckpointError, RecipeError, fsync_folder
from evomerge.plan import MergePlan, ModelHeader, make_plan, other_tokens, read_headers
from evomerge.recipe import Recipe, RecipeFile, naming, with_folders
from evomerge.weights.checkpoint.chat_templates import chosen_template
from evomerge.weights.checkpoint.merged_model import MergedModel
from evomerge.weights.checkpoint.model_files import check_model_files, write_model_files
from evomerge.weights.checkpoint.safetensors_writer import OutputSpec, write_shards
from evomerge.weights.checkpoint.staging import put_in_place, remove_leftovers, staging_folder
from evomerge.weights.checkpoint.stream import StreamedMerge
from evomerge.weights.checkpoint.vocabulary import align
from evomerge.weights.kinship import strangers
from evomerge.weights.mapping import TORCH_DTYPES, MappedModel
from evomerge.weights.merger import DTYPES

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 5_000_000_000
"""the default of Hugging Face"""


def merge_to_folder(
    recipe: Recipe,
    out: Path | str,
    *,
    dtype: str | None = None,
    seed: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_memory: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    written: RecipeFile | None = None,
    where: str | None = None,
) -> Path:
    """Write the merged model: weights, config, tokenizer, generation settings, a model card and the recipe.

    Weights are read, merged and written one tensor at a time. Everything is written to a hidden folder next to `out`, flushed to disk
    and renamed, so an interrupted merge leaves nothing that looks finished, and the next merge to `out` removes
    the leftovers of a killed one. Deterministic: equal recipes and models give equal bytes.

    Args:
        recipe: the merge; its models are folders.
        out: the new folder.
        dtype: type to which the weights are rounded; overrides the recipe's `out_dtype`.
        seed: of random masks; overrides the recipe's.
        shard_bytes: maximum size of a weight file.
        max_memory: maximum total size of the tensors in memory; None = no limit: two parts being computed and a few results.
        device: where to compute; the compiled kernels are used only on "cpu".
        overwrite: replace `out` if it is a model already.
        trust_remote_code: accept models whose config refers to custom code, and copy this code; it is never run.
        written: the recipes shown in the folder's recipe file and model card; None = `recipe`.
        where: prefix of messages about the recipe.

    Returns:
        `out`.

    Raises:
        RecipeError: the recipe does not fit its models, `out` cannot be used, or `max_memory` is too small.
        CheckpointError: a model is damaged or changes during the merge, the result is not finite, or the disk has too little space.
    """
    recipe = _overridden(recipe, seed, dtype)
    if shard_bytes <= 0:
        raise RecipeError(f"shard size must be positive, got {shard_bytes} bytes")
    _check_device(device)
    out = Path(out)
    place = _place_of(out)
    remove_leftovers(place)
    headers = read_headers(recipe, trust_remote_code=trust_remote_code)
    check_target(out, headers, overwrite)
    with naming(where):
        template = None if recipe.chat_template is None else chosen_template(recipe.chat_template, headers)
        alignment = align(recipe, headers)
        plan = make_plan(recipe, headers if alignment is None else alignment.headers(headers))
    check_model_files(headers[recipe.models()[0]].folder, with_tokenizer=alignment is None)
    _report_idle_filters(recipe, plan, headers, where)
    _check_room(place.parent, plan)
    warning = _report_strangers(headers) if _mixes(plan) else None
    if alignment is None:
        _report_other_tokens(recipe, plan, headers)
    merge = StreamedMerge(headers, alignment=alignment, device=device, max_bytes=max_memory)
    with staging_folder(place) as staging:
        write_shards(staging, _outputs(plan, headers), merge.parts(plan), shard_bytes)
        file = written or RecipeFile(recipe)
        result = MergedModel(file, recipe, plan, headers, alignment, warning, template, with_code=trust_remote_code)
        write_model_files(staging, out.name, result)
        _flush(staging)
        put_in_place(staging, place)
    return out


def merge_file_to_folder(file: RecipeFile, out: Path | str, *, overwrite: bool = False, **options: Any) -> Path:
    """Run `merge_to_folder` for the file's result; models that are merges themselves are built first, next to `out`, and removed afterwards.

    Args:
        file: the recipes, as from `read_recipe_file`.
        out, overwrite, options: as in `merge_to_folder`. `seed`, `max_memory`, `device` and `trust_remote_code` apply to every merge, the others
            only to the result.

    Raises:
        RecipeError, CheckpointError: as for `merge_to_folder`.
    """
    if not file.named:
        return merge_to_folder(file.final, out, overwrite=overwrite, where=file.place(), **options)
    out = Path(out)
    remove_leftovers(_place_of(out))
    check_target(out, {}, overwrite)
    seed, dtype = options.pop("seed", None), options.pop("dtype", None)
    named = {name: _overridden(recipe, seed, None) for name, recipe in file.named.items()}
    file = replace(file, final=_overridden(file.final, seed, dtype), named=named)
    shared = {key: options[key] for key in ("max_memory", "device", "trust_remote_code") if key in options}
    with staging_folder(_place_of(out)) as parts:

        def folder(path: str) -> str:
            return str(parts / path) if path in file.named else path

        for name in file.order():
            merge_to_folder(with_folders(file.named[name], folder), parts / name, where=file.place(name), **shared)
        final = with_folders(file.final, folder)
        return merge_to_folder(final, out, overwrite=overwrite, written=file, where=file.place(), **options)


def _overridden(recipe: Recipe, seed: int | None, dtype: str | None) -> Recipe:
    return replace(recipe, out_dtype=dtype or recipe.out_dtype, seed=recipe.seed if seed is None else seed)


def _report_idle_filters(
    recipe: Recipe, plan: MergePlan, headers: Mapping[str, ModelHeader], where: str | None
) -> None:
    names = [*(step.output for step in plan.steps), *(name for header in headers.values() for name in header.tensors)]
    idle = [repr(text) for text in recipe.filters() if not any(text in name for name in names)]
    if idle:
        logger.warning(
            "%s: filter %s matches no tensor name and has no effect; tensor names are %s, ...",
            *(where or "recipe", " and filter ".join(idle), ", ".join(names[:3])),
        )


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()  # fails on devices without memory, such as meta
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA raises AssertionError
        raise RecipeError(f"device {device!r}: cannot be used here: {str(problem).splitlines()[0]}") from None


def _mixes(plan: MergePlan) -> bool:
    """Whether any tensor combines weights of several models, which is not the case in a stack of layers."""
    return any(
        (step.base is not None) + sum(entry.parameters.get("weight") != 0.0 for entry in step.inputs) > 1
        for step in plan.steps
    )


def _report_strangers(headers: Mapping[str, ModelHeader]) -> str | None:
    mapped = {key: MappedModel(header) for key, header in headers.items()}
    warning = strangers(headers, lambda key, name: mapped[key].tensor(name))
    if warning is not None:
        logger.warning(warning)
    return warning


def _report_other_tokens(recipe: Recipe, plan: MergePlan, headers: Mapping[str, ModelHeader]) -> None:
    differing = other_tokens({key: headers[key] for key in recipe.models()}, plan)
    if differing is not None:
        logger.warning("%s; set `tokenizer: {source: base}` in the recipe to align them", differing)


def _place_of(out: Path) -> Path:
    """The target of `out` if it is a link; else `out` itself."""
    return out.resolve() if out.is_symlink() else out


def check_target(out: Path, headers: Mapping[str, ModelHeader], overwrite: bool) -> None:
    """Raise RecipeError if no model can be written to `out`, or only by overwriting another one."""
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out}: is a file; choose a folder")
    target = out.resolve()
    for header in headers.values():
        source = header.folder.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise RecipeError(f"{out}: overlaps the source model {header.folder}; choose another folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / "config.json").exists():
            raise RecipeError(f"{out}: contains files that are not a model; choose another folder")
        if not overwrite:
            raise RecipeError(f"{out}: exists and is not empty; choose another folder, or overwrite it (--overwrite)")


def _check_room(parent: Path, plan: MergePlan) -> None:
    existing = next(place for place in (parent, *parent.resolve().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.output_bytes:
        raise CheckpointError(
            f"{parent}: the merged model needs {plan.output_bytes} bytes, but the disk has only {free} free"
        )


def _outputs(plan: MergePlan, headers: Mapping[str, ModelHeader]) -> list[OutputSpec]:
    outputs = []
    for step in plan.steps:
        dtype = DTYPES[plan.dtype]
        if step.is_copy:
            first = step.inputs[0]
            dtype = TORCH_DTYPES[headers[first.source].tensors[first.tensor].dtype]
        outputs.append(OutputSpec(step.output, step.shape, dtype))
    return outputs


def _flush(folder: Path) -> None:
    """Flush the files of a new model to disk, and gives them the permissions that the umask allows, whatever those of copied files were."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        path.chmod(mode)
    fsync_folder(folder)
