"""Random recipes merge as in mergekit itself, run in its own environment on the same files."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from both_ways import assert_close, files_merged_both_ways
from random_recipes import COMPARABLE, random_document
from safetensors.torch import load_file, save_file

from evomerge.testing.tiny_models import write_tiny_llama

N_LAYERS, N_RECIPES = 4, 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three similar models, in two dtypes."""
    place = tmp_path_factory.mktemp("models")
    for dtype in ("float32", "bfloat16"):
        for seed, name in enumerate(("base", "a", "b", "c")):
            write_tiny_llama(place / dtype / name, seed=seed, n_layers=N_LAYERS, tied=False, dtype=dtype)
        base = load_file(place / dtype / "base" / "model.safetensors")
        for name in "abc":
            file = place / dtype / name / "model.safetensors"
            moved = {key: (base[key] + 0.3 * tensor).to(tensor.dtype) for key, tensor in load_file(file).items()}
            save_file(moved, file, {"format": "pt"})
    return place


def test_random_recipes_equal_mergekit(folder: Path, tmp_path: Path, mergekit: Any) -> None:
    documents = []
    for seed in range(N_RECIPES):
        rng = random.Random(seed)
        models = folder / rng.choice(["float32", "bfloat16"])
        documents.append(random_document(rng, str(models / "base"), [str(models / name) for name in "abc"], N_LAYERS))
    assert {document["merge_method"] for document in documents} == {spec.name for spec in COMPARABLE}
    files = [tmp_path / f"{seed}.yaml" for seed in range(N_RECIPES)]
    for file, document in zip(files, documents, strict=True):
        file.write_text(yaml.safe_dump(document, sort_keys=False))
    for file, (ours, theirs) in files_merged_both_ways(files, mergekit).items():
        try:
            assert_close(ours, theirs, rounded=(torch.bfloat16, torch.float16))
        except AssertionError as error:
            raise AssertionError(f"{file.read_text()}\n{error}") from None
