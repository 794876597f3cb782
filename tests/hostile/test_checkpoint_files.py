"""Bad checkpoint files, classes 15 to 39; 1 to 14 are in test_checkpoint_contents.py. Each class has a test in one of the two, or one
elsewhere that `ELSEWHERE` names and that must exist.

If a class is an error, it is tested through `evomerge merge`: exit code 2, one message, no traceback, nothing left behind; and, if
metadata shows it, before any weight is read.
"""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from bad_classes import check_classes
from checkpoints import INDEX, UP, WEIGHTS, configure, edit, recipe_of, run_merge
from safetensors.torch import load_file, save_file

from evomerge.core import CheckpointError
from evomerge.plan import make_plan, read_model_header
from evomerge.plan.safetensors_header import MAX_HEADER_BYTES
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool
from evomerge.weights.checkpoint.stream import StreamedMerge

ELSEWHERE = {
    36: "weights/test_recipe_forms.py::test_36_adapters_and_models_are_not_mistaken_for_each_other",
    37: "weights/test_recipe_forms.py::test_37_a_permuted_model_is_reported",
}
"""class -> the test that covers it, if it needs more than this file provides"""


def test_every_class_has_a_test() -> None:
    here = [Path(__file__), Path(__file__).with_name("test_checkpoint_contents.py")]
    check_classes(range(1, 40), here, ELSEWHERE)


def raw(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with arbitrary content."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start: object = 0, end: object = 4, shape: object = (1,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sharded(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Splits a model into two shards; returns its weight map and their names."""
    tensors = load_file(folder / WEIGHTS)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name, place in weight_map.items() if place == file}, folder / file)
    (folder / WEIGHTS).unlink()
    write_index(folder, weight_map)
    return weight_map, files


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_15_a_tensor_in_two_shards(models, refused):
    _, files = sharded(models / "a")
    first, second = (load_file(models / "a" / file) for file in files)
    name = next(iter(first))
    save_file({**second, name: first[name].clone()}, models / "a" / files[1])
    refused(f"tensor '{name}' is in two files")


@pytest.mark.parametrize("lost", [100, 20_000])
def test_16_a_truncated_shard(models, refused, lost):
    _, files = sharded(models / "a")
    path = models / "a" / files[1]
    path.write_bytes(path.read_bytes()[:-lost])
    refused(files[1], "truncated", "download it again")


def test_17_a_missing_shard(models, refused):
    _, files = sharded(models / "a")
    (models / "a" / files[0]).unlink()
    refused(f"shard {files[0]} is missing", "download it")


def test_18_a_missing_index(models, refused):
    sharded(models / "a")
    (models / "a" / INDEX).unlink()
    refused(f"no {INDEX}", "download it from")


def test_19_an_index_that_does_not_fit_its_shards(models, refused):
    weight_map, files = sharded(models / "a")
    name = next(iter(weight_map))
    other = files[1 - files.index(weight_map[name])]
    for changed, part in (
        (weight_map | {"ghost": files[0]}, f"lists tensor 'ghost' in {files[0]}, which does not contain it"),
        (weight_map | {name: other}, f"lists tensor '{name}' in {other}, which does not contain it"),
        ({key: file for key, file in weight_map.items() if key != name}, "does not list"),
        ({}, "non-empty 'weight_map'"),
        ({name: 3}, "must map tensor names to file names"),
    ):
        write_index(models / "a", changed)
        refused(INDEX, part)


@pytest.mark.parametrize("path", ["/etc/passwd", "/"])
def test_20_an_absolute_path_in_the_index(models, refused, path):
    weight_map, _ = sharded(models / "a")
    write_index(models / "a", weight_map | {next(iter(weight_map)): path})
    refused(repr(path), "not a file in the model folder")


@pytest.mark.parametrize("path", ["../base/model.safetensors", "..", "sub/x.safetensors", "", "a\x00b", "..\\x"])
def test_21_a_path_that_leaves_the_folder_in_the_index(models, refused, path):
    weight_map, _ = sharded(models / "a")
    write_index(models / "a", weight_map | {next(iter(weight_map)): path})
    refused(repr(path), "not a file in the model folder")


def test_22_a_link_that_leaves_the_folder(models, refused):
    shutil.move(models / "a" / WEIGHTS, models / "outside.safetensors")
    (models / "a" / WEIGHTS).symlink_to(models / "outside.safetensors")
    refused(WEIGHTS, "outside the model folder")


def test_22_links_into_the_cache_of_a_snapshot_are_allowed(models):
    hub = models / "models--org--name"
    snapshot = hub / "snapshots" / "abc"
    (hub / "blobs").mkdir(parents=True)
    shutil.copytree(models / "a", snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.move(models / "a" / WEIGHTS, hub / "blobs" / "0123")
    (snapshot / WEIGHTS).symlink_to(hub / "blobs" / "0123")
    assert read_model_header(snapshot).n_layers == 2


def test_23_a_header_over_100_mb(models, refused):
    with (models / "a" / WEIGHTS).open("wb") as stream:  # a sparse file that takes no disk space
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
        os.truncate(stream.fileno(), 2 * MAX_HEADER_BYTES)
    refused(WEIGHTS, f"claims {MAX_HEADER_BYTES + 1} bytes", f"limit is {MAX_HEADER_BYTES}")


def test_24_a_header_with_100000_entries(models, refused):
    raw(models / "a" / WEIGHTS, {f"t{i}": entry(4 * i, 4 * i + 4) for i in range(100_000)}, b"\0" * 400_000)
    refused("/a has no tensor")


def test_25_overlapping_offsets(models, refused):
    raw(models / "a" / WEIGHTS, {"x": entry(), "y": entry(2, 6)}, b"12345678")
    refused(WEIGHTS, "'y' overlaps the tensor before it")
    raw(models / "a" / WEIGHTS, {"x": entry(), "y": entry(6, 10)}, b"1234567890")
    refused(WEIGHTS, "'y' leaves a gap")


@pytest.mark.parametrize(
    ("header", "data", "part"),
    [
        (entry(0, 4), b"12", "truncated or still being written"),
        (entry(0, 4), b"123456", "2 bytes after the last tensor"),
        (entry(0, 8), b"12345678", "needs 4 bytes"),
        (entry(0, 4, (1 << 61, 1 << 61)), b"1234", "needs"),
        (entry(1 << 70, (1 << 70) + 4), b"1234", "whole numbers"),
        (entry(0, 4, (-1,)), b"1234", "whole numbers"),
        (entry(0, 4, (1.0,)), b"1234", "whole numbers"),
        (entry(True, 4), b"1234", "whole numbers"),
        (entry(0, 4, "1"), b"1234", "whole numbers"),
        ({"dtype": "F32"}, b"", "expected dtype, shape"),
        (3, b"", "expected dtype, shape"),
    ],
)
def test_26_impossible_offsets_and_shapes(models, refused, header, data, part):
    raw(models / "a" / WEIGHTS, {"x": header}, data)
    refused(WEIGHTS, part)


def test_27_duplicate_keys(models, refused):
    text = json.dumps(entry()).encode()
    raw(models / "a" / WEIGHTS, b'{"x": %s, "x": %s}' % (text, text), b"1234")
    refused(WEIGHTS, "'x' appears twice")
    (models / "a" / "config.json").write_text('{"model_type": "llama", "model_type": "llama"}')
    refused("config.json", "'model_type' appears twice")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (b"\xff\xfe{", "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b'{"a"', "damaged JSON"),
        (b'{"a":\x00}', "damaged JSON"),
        (b'{"a":NaN}', "damaged JSON"),
        (b"[" * 100_000, "damaged JSON"),
        (b'{"__metadata__": 3}', "__metadata__"),
        (b"{}", "contain no tensors"),
    ],
)
def test_28_a_header_that_is_not_utf_8_or_not_json(models, refused, header, part):
    raw(models / "a" / WEIGHTS, header)
    refused("/a", part)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"PK\x03\x04" + b"\0" * 60, "zip archive"),
        (pickle.dumps({"x": 1}, 4) + b"\0" * 60, "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"", "truncated"),
        (b"\x01\x02", "truncated"),
        (struct.pack("<Q", 1 << 63), "claims"),
    ],
)
def test_29_other_content_under_the_name_of_a_checkpoint(models, refused, content, part):
    (models / "a" / WEIGHTS).write_bytes(content)
    refused(WEIGHTS, part)


def test_30_an_unknown_dtype(models, refused):
    raw(models / "a" / WEIGHTS, {"x": entry(0, 4, (1,), "F4")}, b"1234")
    refused("tensor 'x'", "unknown dtype 'F4'", "known: F64, F32")


def test_31_mixed_dtypes_in_one_source(models, monkeypatch):
    """Each tensor is read in its own dtype; the result has a single one, that of most bytes of the first model."""

    def mix(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].to(torch.float16 if "mlp" in name else torch.bfloat16)

    edit(models / "a", mix)
    edit(models / "base", mix)
    run_merge(models, monkeypatch, recipe_of(out_dtype="float32"))
    base, a, b, merged = (load_file(models / name / WEIGHTS) for name in ("base", "a", "b", "out"))
    for name, tensor in merged.items():
        start = base[name].float()
        wanted = start + (0.5 * (a[name].float() - start) + 0.5 * (b[name] - start))
        assert torch.equal(tensor, wanted), name
    shutil.rmtree(models / "out")
    run_merge(models, monkeypatch, recipe_of())
    assert {tensor.dtype for tensor in load_file(models / "out" / WEIGHTS).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "part"),
    [("awq", "quantization_config"), ("qweight", "shows that the model is quantised"), ("fp8", "quantised (F8_E4M3)"),
     ("scales", "shows that the model is quantised")],
)  # fmt: skip
def test_32_quantised_sources(models, refused, kind, part):
    if kind == "awq":
        configure(models / "a", quantization_config={"quant_method": "awq"})
    elif kind == "fp8":
        raw(models / "a" / WEIGHTS, {"x": entry(0, 4, (4,), "F8_E4M3")}, b"1234")
    else:
        extra = {"qweight": "layers.0.q.qweight", "scales": UP + "_scale_inv"}[kind]
        edit(models / "a", lambda tensors: tensors.update({extra: torch.ones(2)}))
    refused("/a", part, "merge the original weights instead")


def test_33_only_pickled_weights(models, refused):
    (models / "a" / WEIGHTS).rename(models / "a" / "pytorch_model.bin")
    refused("/a", "only pickled weights", "weights_only=True")


def test_34_remote_code(models, refused, monkeypatch):
    configure(models / "base", auto_map={"AutoModel": "modeling_x.Y"})
    for name, content in (
        ("modeling_x.py", "from .layers import Z"),
        ("layers.py", "raise SystemExit"),
        ("notes.md", ""),
    ):
        (models / "base" / name).write_text(content)
    refused("config.json", "'auto_map'", "--trust-remote-code", "a search cannot use")
    run_merge(models, monkeypatch, recipe_of(), "--trust-remote-code")
    copied = {path.name: path.read_text() for path in (models / "out").glob("*.py")}
    assert copied == {"modeling_x.py": "from .layers import Z", "layers.py": "raise SystemExit"}
    assert not (models / "out" / "notes.md").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_34_remote_code_of_a_tokenizer(models, monkeypatch, caplog, trusted):
    settings = json.loads((models / "base" / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.T", None]}
    (models / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    (models / "base" / "tokenization_x.py").write_text("")
    run_merge(models, monkeypatch, recipe_of(), *(["--trust-remote-code"] if trusted else []))
    assert (models / "out" / "tokenization_x.py").exists() == trusted
    said = (
        "auto_map in tokenizer_config.json refers to code in the model's repository, which is not copied" in caplog.text
    )
    assert said != trusted


def test_34_code_that_is_a_link_leaving_the_folder(models, monkeypatch):
    configure(models / "base", auto_map={"AutoModel": "modeling_x.Y"})
    (models / "secret").write_text("")
    (models / "base" / "modeling_x.py").symlink_to(models / "secret")
    with pytest.raises(SystemExit):
        run_merge(models, monkeypatch, recipe_of(), "--trust-remote-code")
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rope_theta": 500_000.0}, "rope = {'rope_theta': 500000.0}"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'rope_type': 'llama3'"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, "num_attention_heads = 8"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
    ],
)
def test_35_a_different_rope_base_or_head_layout(models, refused, changes, part):
    configure(models / "a", **changes)
    refused("/a: config.json has", part, "have different meanings")


def test_35_different_spellings_of_the_same_rope_are_equal(models, monkeypatch):
    configure(models / "a", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10000})
    run_merge(models, monkeypatch, recipe_of())


def test_38_a_source_that_changes_during_a_merge(models, refused, monkeypatch):
    read, calls = StreamedMerge._read, []

    def read_and_change(self, step):
        calls.append(step)
        if len(calls) == 3:
            os.utime(models / "a" / WEIGHTS, ns=(1, 1))
        return read(self, step)

    monkeypatch.setattr(StreamedMerge, "_read", read_and_change)
    refused("/a/model.safetensors: changed since it was first read", "complete copy", reads_weights=True)


def test_38_a_source_that_changes_during_a_run(models):
    headers = {str(models / name): read_model_header(models / name) for name in "ab"}
    sources = tuple(Source(key, None, {"weight": (Setting(1.0),)}) for key in headers)
    plan, merger = make_plan(Recipe("linear", (Slice(sources),)), headers), Merger(WeightPool(headers))

    class Target:
        def names(self):
            return []

    merger.write(plan, Target())
    write_tiny_llama(models / "b", seed=9, dtype="float32")
    with pytest.raises(CheckpointError, match=r"b/model\.safetensors: changed since"):
        merger.write(plan, Target())


def test_39_a_folder_that_is_still_being_written(models, refused):
    """The header is there first and the data grows; or some shards have arrived and others have not."""
    whole = (models / "a" / WEIGHTS).read_bytes()
    for share in (0.3, 0.9):
        (models / "a" / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
        refused(WEIGHTS, "truncated or still being written")
    (models / "a" / WEIGHTS).write_bytes(whole)
    _, files = sharded(models / "a")
    (models / "a" / files[1]).rename(models / "a" / (files[1] + ".incomplete"))
    refused(f"shard {files[1]} is missing")
