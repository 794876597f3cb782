"""Disk contents and memory use of `evomerge merge`: shards, limits, interruptions; and vocabularies joined as in mergekit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from both_ways import stored
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import EvomergeError, merge_recipe
from evomerge.testing.tiny_models import CHARACTERS, SPECIAL_TOKENS, write_tiny_llama
from evomerge.weights.checkpoint.staging import put_in_place, remove_leftovers, staging_folder


def with_token(folder: Path, tokens: list[str], seed: int) -> Path:
    """A tiny model whose vocabulary ends with its own `tokens`."""
    write_tiny_llama(folder, seed=seed, dtype="float32", tied=False, vocab=len(SPECIAL_TOKENS) + len(CHARACTERS))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = 0.2 * torch.randn(rows - len(tensors[name]), tensors[name].shape[1], generator=generator)
        tensors[name] = torch.cat([tensors[name], extra])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(folder / name, seed=seed, dtype="float32", tied=False, n_layers=2)
    return folder


def merged(recipe: str, folder: Path, **options: object) -> dict[str, torch.Tensor]:
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return stored(merge_recipe(path, folder / "out", overwrite=True, **options))


@pytest.mark.parametrize("source", ["union", "base"])
def test_vocabularies_are_joined_as_in_mergekit(tmp_path: Path, mergekit: Callable[..., None], source: str) -> None:
    for seed, (name, tokens) in enumerate({"base": ["<x>"], "a": ["<x>", "<y>"], "b": ["<z>", "<y>"]}.items()):
        with_token(tmp_path / name, tokens, seed)
    recipe = yaml.safe_dump(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.4}} for name in "ab"],
            "tokenizer": {"source": source},
            "dtype": "float32",
        }
    )
    ours = merged(recipe, tmp_path)
    mergekit("-m", "mergekit.scripts.run_yaml", tmp_path / "recipe.yaml", tmp_path / "theirs", "--allow-crimes")
    theirs = stored(tmp_path / "theirs")
    our_tokens, their_tokens = (
        AutoTokenizer.from_pretrained(tmp_path / part).get_vocab() for part in ("out", "theirs")
    )
    assert set(our_tokens) == set(their_tokens)
    assert {"<x>", "<y>", "<z>"} <= set(our_tokens) if source == "union" else "<z>" not in our_tokens
    for name, expected in theirs.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = [[tokens[token] for token in sorted(our_tokens)] for tokens in (our_tokens, their_tokens)]
            torch.testing.assert_close(ours[name][rows[0]], expected[rows[1]], rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(ours["model.embed_tokens.weight"]) == len(our_tokens)


def test_output_is_sharded_and_has_the_requested_dtype(models: Path, tmp_path: Path) -> None:
    recipe = f"merge_method: linear\nmodels: [{{model: {models}/a, parameters: {{weight: 1}}}}]\n"
    whole = merged(recipe, tmp_path)
    pieces = merged(recipe, tmp_path, shard_size=20_000, dtype="bfloat16")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 3
    assert max(file.stat().st_size for file in files) < 25_000
    assert all(torch.equal(pieces[name], tensor.to(torch.bfloat16)) for name, tensor in whole.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


PEAK = """
import resource, sys
from evomerge import merge_recipe
import torch, numba
from evomerge.weights import merge_file_to_folder
options = {} if sys.argv[3] == "none" else {"max_memory": int(sys.argv[3])}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_recipe(sys.argv[1], sys.argv[2], **options)
print("grew", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_use_does_not_grow_with_the_models(tmp_path: Path) -> None:
    """Two models of 76 MB each; the largest tensors have 4 MB, so a merge holds a few tensors but never a whole model."""
    for seed, name in enumerate("ab"):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=8, hidden=512, dtype="float32", intermediate_size=1024)
    weight = "parameters: {weight: 1}"
    (tmp_path / "recipe.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: {tmp_path}/a, {weight}}}, {{model: {tmp_path}/b, {weight}}}]\n"
    )
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK, str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "16000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    grew = int(done.stdout.split("grew")[1])
    assert grew < 0.8 * size, f"{grew} bytes for models of {size} each"
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(EvomergeError, match="max-memory is 1000000 bytes"):
        merge_recipe(tmp_path / "recipe.yaml", tmp_path / "out", max_memory=1_000_000)
    assert not (tmp_path / "out").exists()


SLOWLY = """
import signal
import time
from evomerge.weights.checkpoint.stream import StreamedMerge

parts = StreamedMerge.parts

def slow_parts(self, plan):
    for part in parts(self, plan):
        time.sleep(0.1)
        yield part

StreamedMerge.parts = slow_parts
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
"""


def started_merge(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """A merge of two models by `python -c code`, which takes seconds; returned once it has begun to write."""
    for seed, name in enumerate("ab"):
        write_tiny_llama(folder / name, seed=seed, n_layers=8, hidden=512, dtype="float32", intermediate_size=1024)
    weight = "parameters: {weight: 1}"
    (folder / "recipe.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: {folder}/a, {weight}}}, {{model: {folder}/b, {weight}}}]\n"
    )
    process = subprocess.Popen([sys.executable, "-c", SLOWLY + code, "merge", folder / "recipe.yaml", folder / "out"])
    while process.poll() is None and not list(folder.glob(".out.*/*.safetensors")):
        time.sleep(0.01)
    assert process.poll() is None, "the merge finished before it could be stopped"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_merge_removes_what_it_wrote(tmp_path: Path, number: int) -> None:
    process = started_merge(tmp_path, "from evomerge.cli.main import main; main()")
    process.send_signal(number)
    assert process.wait() == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "recipe.yaml"]


def test_killed_merge_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = started_merge(tmp_path, "import sys; from evomerge import merge_recipe; merge_recipe(*sys.argv[2:])")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert all(
        path.name.startswith(".out.") for path in tmp_path.iterdir() if path.name not in ("a", "b", "recipe.yaml")
    )
    merge_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "recipe.yaml"]


def test_folders_of_possibly_running_merges_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    foreign = tmp_path / ".out.0123abcd-xyz.merging"
    (foreign / "weights").mkdir(parents=True)
    with staging_folder(out) as live, staging_folder(tmp_path / "out.b") as other:
        remove_leftovers(out)
        assert live.exists()
        assert other.exists()
        assert foreign.exists()
        assert "another machine" in caplog.text
        assert str(foreign) in caplog.text
    left = tmp_path / live.name
    (left / "weights").mkdir(parents=True)
    (tmp_path / ".out.b.1-2.merging").mkdir()
    remove_leftovers(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([foreign.name, ".out.b.1-2.merging"])


@pytest.fixture
def linear(models: Path, tmp_path: Path) -> Path:
    weight = "parameters: {weight: 1}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels: [{{model: {models}/a, {weight}}}, {{model: {models}/b, {weight}}}]\n"
    )
    return recipe


class Killed(BaseException):
    pass


def dying_at(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Makes the process die instead of renaming a folder to `target`."""
    replace = os.replace

    def dying(source: Path, to: Path) -> None:
        if to == target and ".merging" in str(source):
            raise Killed
        replace(source, to)

    monkeypatch.setattr("os.replace", dying)


def test_interrupted_merge_restores_the_model_it_had_moved_aside(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = merge_recipe(linear, linear.parent / "out")
    (out / "mine").touch()
    dying_at(monkeypatch, out)
    with pytest.raises(Killed):
        merge_recipe(linear, out, overwrite=True)
    assert (out / "mine").exists()
    assert sorted(path.name for path in linear.parent.iterdir()) == ["out", "recipe.yaml"]


def test_next_merge_restores_the_model_that_a_killed_merge_had_moved_aside(
    linear: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = merge_recipe(linear, linear.parent / "out")
    (out / "mine").touch()
    out.rename(linear.parent / ".out.1-2.replaced")
    with pytest.raises(EvomergeError, match="exists and is not empty"):
        merge_recipe(linear, out)
    assert (out / "mine").exists()
    assert "restored" in caplog.text
    (linear.parent / ".out.1-2.replaced").mkdir()  # remains of a folder whose deletion was interrupted by a kill
    merge_recipe(linear, out, overwrite=True)
    assert not (out / "mine").exists()
    assert sorted(path.name for path in linear.parent.iterdir()) == ["out", "recipe.yaml"]


def test_model_moved_aside_is_not_restored_while_its_merge_is_running(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staging_folder(out) as staging:
        staging.with_suffix(".replaced").mkdir()  # between its two renames
        remove_leftovers(out)
        assert not out.exists()
        put_in_place(staging, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_merge_that_finishes_while_another_replaces_its_model_restores_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with staging_folder(out) as second:
        (second / "second").touch()
        with staging_folder(out) as first:
            put_in_place(first, out)
            out.rename(second.with_suffix(".replaced"))  # between its two renames
        assert not out.exists()
        put_in_place(second, out)
    assert [path.name for path in out.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_there", [True, False])
def test_link_to_the_output_folder_stays_a_link(linear: Path, is_there: bool) -> None:
    disk = linear.parent / "disk"
    disk.mkdir()
    if is_there:
        merge_recipe(linear, disk / "model")
        (disk / "model" / "mine").touch()
    link = linear.parent / "out"
    link.symlink_to(disk / "model", target_is_directory=True)
    assert merge_recipe(linear, link, overwrite=True) == link
    assert link.is_symlink()
    assert not (disk / "model" / "mine").exists()
    assert (disk / "model" / "config.json").exists()
    assert [
        [path.name for path in folder.iterdir() if path.name.startswith(".")] for folder in (disk, linear.parent)
    ] == [[], []]
