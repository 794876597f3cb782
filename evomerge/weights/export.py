"""`merge_to_folder`: a recipe becomes a complete Hugging Face model folder, or nothing at all."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from evomerge.core import CheckpointError, RecipeError, fsync_folder
from evomerge.plan import MergePlan, ModelHeader, make_plan, read_model_header
from evomerge.plan.planner import is_copy
from evomerge.recipe import Recipe
from evomerge.weights.mapping import TORCH_DTYPES
from evomerge.weights.merger import DTYPES, Merger
from evomerge.weights.model_files import write_model_files
from evomerge.weights.pool import WeightPool
from evomerge.weights.safetensors_writer import OutputSpec, write_shards

DEFAULT_SHARD_BYTES = 5_000_000_000
"""as Hugging Face writes them"""


def merge_to_folder(
    recipe: Recipe,
    out: Path | str,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    pool: WeightPool | None = None,
) -> Path:
    """Writes the merged model: weights, config, tokenizer, generation settings, a model card and the recipe.

    Everything is written into a hidden folder beside `out`, flushed to disk and renamed, so an interrupted merge leaves
    nothing that looks finished. Deterministic: equal recipes and models give equal bytes.

    Args:
        recipe: the merge; its models are folders.
        out: the new folder.
        dtype: what the weights are rounded to; overrides the recipe's `out_dtype`.
        shard_bytes: largest size of a weight file.
        overwrite: replace `out` if it exists and is not empty.
        trust_remote_code: accept models whose config names code of their own.
        pool: weights that are loaded already; must hold the recipe's models.

    Returns:
        `out`.

    Raises:
        RecipeError: the recipe does not fit its models, or `out` is in the way.
        CheckpointError: a model is damaged, the result is not finite, or the disk has no room.
    """
    if dtype is not None:
        recipe = replace(recipe, out_dtype=dtype)
    if shard_bytes <= 0:
        raise RecipeError(f"shard size must be positive, got {shard_bytes} bytes")
    out = Path(out)
    headers = pool.headers if pool is not None else read_headers(recipe, trust_remote_code=trust_remote_code)
    _check_target(out, headers, overwrite)
    plan = make_plan(recipe, headers)
    _check_room(out.parent, plan)
    merger = Merger(pool if pool is not None else WeightPool({key: headers[key] for key in recipe.models()}))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".merging"))
    except OSError as problem:
        raise CheckpointError(f"{out.parent}: cannot be written: {problem.strerror}") from None
    try:
        write_shards(staging, _outputs(plan, headers), merger.tensors(plan), shard_bytes)
        write_model_files(staging, out.name, recipe, plan, headers)
        _flush(staging)
        _put_in_place(staging, out)
    except OSError as problem:
        raise CheckpointError(f"{out}: cannot be written: {problem.strerror or problem}; nothing was kept") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def read_headers(recipe: Recipe, *, trust_remote_code: bool = False) -> dict[str, ModelHeader]:
    """The header of every model of `recipe`, by its key.

    Raises:
        RecipeError: a pinned revision or an adapter, which only resolved recipes can have.
        CheckpointError: as `read_model_header`.
    """
    for piece in recipe.slices:
        for source in piece.sources:
            if source.revision is not None:
                raise RecipeError(
                    f"{source.key}: a revision pins a hub model; give the folder of that revision instead"
                )
            if source.lora is not None:
                raise RecipeError(
                    f"{source.key}: adapters are not supported by evomerge; merge the adapter into its model"
                )
    return {key: read_model_header(key, trust_remote_code=trust_remote_code) for key in recipe.models()}


def _check_target(out: Path, headers: Mapping[str, ModelHeader], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise RecipeError(f"{out}: exists and is not empty; name another folder or allow overwriting")
    target = out.resolve()
    for header in headers.values():
        source = header.folder.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise RecipeError(f"{out}: overlaps the source model {header.folder}; name another folder")


def _check_room(parent: Path, plan: MergePlan) -> None:
    existing = next(place for place in (parent, *parent.resolve().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.output_bytes:
        raise CheckpointError(f"{parent}: the merged model needs {plan.output_bytes} bytes, the disk has {free} free")


def _outputs(plan: MergePlan, headers: Mapping[str, ModelHeader]) -> list[OutputSpec]:
    outputs = []
    for step in plan.steps:
        dtype = DTYPES[plan.dtype]
        if is_copy(step):
            first = step.inputs[0]
            dtype = TORCH_DTYPES[headers[first.source].tensors[first.tensor].dtype]
        outputs.append(OutputSpec(step.output, step.shape, dtype))
    return outputs


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        path.chmod(0o644)
    folder.chmod(0o755)
    fsync_folder(folder)


def _put_in_place(staging: Path, out: Path) -> None:
    """Renames `staging` to `out`; a folder in its place is moved aside first and deleted last."""
    aside = staging.with_suffix(".replaced")
    if out.is_dir():
        os.replace(out, aside)
    os.replace(staging, out)
    fsync_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
