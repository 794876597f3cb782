"""Recipes merged by evomerge and by mergekit, run in its own environment on the recipe files we export."""

import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from evomerge.recipe import Recipe, write_recipe
from evomerge.weights import merge_to_folder

Tensors = dict[str, torch.Tensor]


def merged_both_ways(
    recipes: Mapping[Hashable, Recipe], folder: Path, mergekit: Callable[..., None]
) -> dict[Hashable, tuple[Tensors, Tensors]]:
    """Key of a recipe -> (ours, mergekit's) tensors; mergekit is started once for all."""
    files = {key: folder / f"{number}.yaml" for number, key in enumerate(recipes)}
    for key, file in files.items():
        merge_to_folder(recipes[key], file.with_suffix(".ours"))
        write_recipe(recipes[key], file)
    (folder / "jobs.json").write_text(
        json.dumps([[str(file), str(file.with_suffix(".theirs"))] for file in files.values()])
    )
    mergekit(Path(__file__).with_name("mergekit_runner.py"), folder / "jobs.json")
    return {
        key: (stored(file.with_suffix(".ours")), stored(file.with_suffix(".theirs"))) for key, file in files.items()
    }


def stored(folder: Path) -> Tensors:
    """The tensors of a model's folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_close(ours: Tensors, theirs: Tensors) -> None:
    """The same tensors, but for rounding in float32."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-6, atol=1e-6 * scale, msg=lambda m, t=name: f"{t}: {m}"
        )
