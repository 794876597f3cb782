"""A merged folder is either complete or absent."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from evomerge.core import CheckpointError, EvomergeError, RecipeError
from evomerge.plan import read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source, read_recipe
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import merge_to_folder
from evomerge.weights.checkpoint import export as export_module
from evomerge.weights.checkpoint.uncached_file import BLOCK_BYTES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(write_tiny_llama(folder / f"m{seed}", seed=seed)) for seed in range(2)]


def average(models, **kwargs):
    sources = tuple(Source(model, None, {"weight": (Setting(1.0),)}) for model in models)
    return Recipe("linear", (Slice(sources),), **kwargs)


def test_merge_writes_a_complete_model_folder(models, tmp_path):
    recipe = average(models, seed=4, name="mine")
    out = merge_to_folder(recipe, tmp_path / "new" / "out")
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "recipe.yaml",
    }
    assert read_recipe(out / "recipe.yaml") == recipe
    sources = [load_file(f"{model}/model.safetensors") for model in models]
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = ((sources[0][name].float() + sources[1][name].float()) / 2).bfloat16()
        assert torch.equal(tensor, expected), name
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "linear" in card
    assert os.listdir(tmp_path / "new") == ["out"]


def test_merged_folder_permissions_follow_the_umask(models, tmp_path):
    before = os.umask(0o027)
    try:
        out = merge_to_folder(average(models), tmp_path / "out")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_equal_merges_write_equal_bytes(models, tmp_path):
    for name in ("a", "b"):
        merge_to_folder(average(models), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_shard_size_and_dtype_are_applied(models, tmp_path):
    out = merge_to_folder(average(models), tmp_path / "out", dtype="float32", shard_bytes=20_000)
    header = read_model_header(out)
    assert len(header.files) > 2
    assert header.dtype == "float32"
    assert header.config["dtype"] == "float32"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.end - t.start for t in header.tensors.values())
    for file in header.files:
        held = [(tensor.start, tensor.end) for tensor in header.tensors.values() if tensor.file == file]
        first, last = min(held)[0], max(held)[1]
        assert first % BLOCK_BYTES == 0, "uncached writes may begin only here"
        assert last - first <= 20_000 or len(held) == 1


def test_config_counts_stacked_layers(models, tmp_path):
    pieces = tuple(
        Slice((Source(models[0], layers, {"weight": (Setting(1.0),)}),)) for layers in [(0, 2), (1, 2), (0, 1)]
    )
    out = merge_to_folder(Recipe("linear", pieces), tmp_path / "out")
    header = read_model_header(out)
    assert header.n_layers == 4
    merged, source = load_file(out / "model.safetensors"), load_file(f"{models[0]}/model.safetensors")
    for new, old in enumerate([0, 1, 1, 0]):
        name = "mlp.up_proj.weight"
        assert torch.equal(merged[f"model.layers.{new}.{name}"], source[f"model.layers.{old}.{name}"])


def test_existing_folder_is_kept_unless_overwrite_is_set(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    merge_to_folder(average(models), out)  # empty: fine
    (out / "mark").write_text("x")
    with pytest.raises(RecipeError, match="not empty"):
        merge_to_folder(average(models), out)
    assert (out / "mark").exists()
    merge_to_folder(average(models), out, overwrite=True)
    assert not (out / "mark").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_not_a_model_is_never_replaced(models, tmp_path, overwrite):
    """A typing mistake such as `evomerge merge best.yaml runs/mine --overwrite` must not destroy a run."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "journal.jsonl").write_text("x")
    with pytest.raises(RecipeError, match="contains files that are not a model"):
        merge_to_folder(average(models), tmp_path / "runs", overwrite=overwrite)
    assert (tmp_path / "runs" / "journal.jsonl").exists()


@pytest.mark.parametrize("where", [".", "..", "inside"])
def test_sources_are_never_overwritten(models, where):
    with pytest.raises(RecipeError, match="overlaps"):
        merge_to_folder(average(models), Path(models[0]) / where, overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_merge_leaves_nothing(models, tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    merge_to_folder(average(models), out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(export_module, "write_model_files", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        merge_to_folder(average(models, dtype="bfloat16"), out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_bytes() == before


def test_full_disk_is_detected_before_merging(models, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="has only 10 free"):
        merge_to_folder(average(models), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_links_out_of_the_model_folder_are_refused(models, tmp_path):
    other = write_tiny_llama(tmp_path / "other", seed=1)
    (other / "tokenizer_config.json").unlink()
    (other / "tokenizer_config.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="outside the model folder"):
        merge_to_folder(average([str(other), *models]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_json_files_that_are_not_objects_are_refused_before_weights_are_read(
    models, tmp_path, monkeypatch, name, content
):
    other = write_tiny_llama(tmp_path / "other", seed=1)
    (other / name).write_text(content)
    monkeypatch.delattr(export_module, "StreamedMerge")
    with pytest.raises(CheckpointError, match=rf"other/{name}: (damaged JSON|expected a JSON object)"):
        merge_to_folder(average([str(other), *models]), tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "message"), [(Source("m", revision="abc"), "revision"), (Source("m", lora="x"), "no such model folder")]
)
def test_unresolved_sources_are_refused(source, message, tmp_path):
    with pytest.raises(EvomergeError, match=message):
        merge_to_folder(Recipe("linear", (Slice((source,)),), None, {"weight": (Setting(1.0),)}), tmp_path / "o")
