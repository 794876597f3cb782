"""`merge_recipe`: merges a recipe and writes the model."""

from pathlib import Path
from typing import Any

from evomerge.core import FilePath, RecipeError, parse_bytes
from evomerge.recipe import DTYPES, Recipe, RecipeFile, read_recipe_file


def merge_recipe(
    recipe: FilePath | Recipe,
    out: FilePath,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_size: str | int | None = None,
    max_memory: str | int | None = None,
    device: str = "cpu",
    seed: int | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Merge a recipe (evomerge's or mergekit's) into a checkpoint folder and return the folder.

    Args:
        recipe: a recipe, e.g. from `Run.recipe`, or a file. A file may hold several documents, which can use the models that the others make.
        out: the new folder.
        dtype: dtype of the result, instead of the recipe's.
        overwrite: replace `out` if it already holds a model.
        shard_size: maximum size of a weight file, in bytes or as a string such as "5GB".
        max_memory: limit for all tensors in memory at a time, in bytes or as a string; None = those of two steps and a few results.
        device: where to compute; only "cpu" uses the compiled kernels; "auto" uses a GPU if there is one.
        seed: seed of random masks, instead of the recipe's.
        trust_remote_code: accept models that include code, and copy it (it is not run).

    Raises:
        RecipeError: the file is not a valid recipe, an option is invalid, or `out` exists.
        CheckpointError: a model cannot be read, or the result is not finite.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    options: dict[str, Any] = {} if shard_size is None else {"shard_bytes": parse_bytes(shard_size, "shard size")}
    if max_memory is not None:
        options["max_memory"] = parse_bytes(max_memory, "max memory")
    file = RecipeFile(recipe) if isinstance(recipe, Recipe) else read_recipe_file(Path(recipe))
    # takes a second, so the recipe is read first
    import torch

    from evomerge.weights import merge_file_to_folder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return merge_file_to_folder(
        file,
        Path(out),
        dtype=dtype,
        overwrite=overwrite,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
        **options,
    )
