"""Merge recipes with evomerge and with mergekit, which runs in its own environment on the recipe files we export."""

import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from evomerge import merge_recipe
from evomerge.recipe import Recipe, write_recipe

Tensors = dict[str, torch.Tensor]


def merged_both_ways(
    recipes: Mapping[Hashable, Recipe], folder: Path, mergekit: Callable[..., None]
) -> dict[Hashable, tuple[Tensors, Tensors]]:
    """Recipe key -> (our tensors, mergekit's tensors); mergekit is started once for all recipes."""
    files = {key: folder / f"{number}.yaml" for number, key in enumerate(recipes)}
    for key, file in files.items():
        write_recipe(recipes[key], file)
    merged = files_merged_both_ways([*files.values()], mergekit)
    return {key: merged[file] for key, file in files.items()}


def files_merged_both_ways(files: Sequence[Path], mergekit: Callable[..., None]) -> dict[Path, tuple[Tensors, Tensors]]:
    """Recipe file -> (our tensors, mergekit's); the merged models are written next to the files; mergekit is started once for all."""
    for file in files:
        merge_recipe(file, file.with_suffix(".ours"))
    jobs = files[0].with_name("jobs.json")
    jobs.write_text(json.dumps([[str(file), str(file.with_suffix(".theirs"))] for file in files]))
    mergekit(Path(__file__).with_name("mergekit_runner.py"), jobs)
    return {file: (stored(file.with_suffix(".ours")), stored(file.with_suffix(".theirs"))) for file in files}


def stored(folder: Path) -> Tensors:
    """The tensors of a model folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_close(ours: Tensors, theirs: Tensors, *, rounded: Collection[torch.dtype] = (torch.bfloat16,)) -> None:
    """The tensors agree up to float32 rounding; in the 16-bit dtypes in `rounded`, up to one unit in the last place."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        scale = expected.abs().max().item()
        if expected.dtype not in rounded:
            torch.testing.assert_close(
                ours[name], expected, rtol=1e-6, atol=1e-6 * scale, msg=lambda m, t=name: f"{t}: {m}"
            )
            continue
        # values that nearly cancel are compared relative to the tensor's scale
        far = (_ordered_bits(ours[name]) - _ordered_bits(expected)).abs() > 1
        close = (ours[name].float() - expected.float()).abs() <= 1e-6 * scale
        assert not (far & ~close).any(), name


def _ordered_bits(tensor: torch.Tensor) -> torch.Tensor:
    """16-bit values as integers whose difference is the number of units in the last place."""
    bits = tensor.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
