"""`merge_recipe`: writes the model that a recipe makes."""

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
    """Materialises a recipe (evomerge's or mergekit's) as a checkpoint folder and returns the folder.

    Args:
        recipe: one as `Run.recipe` gives it, or a file; it may hold several documents, of which the others make models that the result is
            made of.
        out: the new folder.
        dtype: written instead of the recipe's.
        overwrite: replace `out` if it is a model already.
        shard_size: of weight files, in bytes or as text, e.g. "5GB".
        max_memory: of all tensors in memory at a time, in bytes or as text; None = those of two steps and a few results.
        device: where to compute; anything but "cpu" does without the compiled kernels; "auto" = on a GPU if there is one.
        seed: of random masks, instead of the recipe's.
        trust_remote_code: accept models whose config names code of their own, and copy it (it is not run).

    Raises:
        RecipeError: the file is no recipe, an option is not understood, `out` exists.
        CheckpointError: a model cannot be read, or the result is not finite.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r}: unknown; known: {', '.join(DTYPES)}")
    options: dict[str, Any] = {} if shard_size is None else {"shard_bytes": parse_bytes(shard_size, "shard size")}
    if max_memory is not None:
        options["max_memory"] = parse_bytes(max_memory, "max memory")
    file = RecipeFile(recipe) if isinstance(recipe, Recipe) else read_recipe_file(Path(recipe))
    # a second's work, for which a recipe that cannot be read does not wait
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
