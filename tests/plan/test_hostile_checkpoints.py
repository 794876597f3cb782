"""Damaged and malicious model folders: each class is refused with a message that names the file or tensor."""

import contextlib
import json
import shutil
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.core import CheckpointError
from evomerge.plan import check_unchanged, read_model_header
from evomerge.plan.safetensors_header import MAX_HEADER_BYTES, read_safetensors_header
from evomerge.testing.tiny_models import write_tiny_llama


@pytest.fixture
def folder(tmp_path):
    return write_tiny_llama(tmp_path / "model", seed=1)


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def split_into_shards(folder):
    """Two shards and an index, as Hugging Face writes them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, part in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in zip(files, halves, strict=True) for name in part}
    write_index(folder, weight_map)
    return weight_map, files


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_header_of_a_good_model(folder):
    header = read_model_header(folder)
    assert (header.n_layers, header.tied, header.vocab_size, header.dtype) == (2, True, 128, "bfloat16")
    assert header.architecture == "LlamaForCausalLM"
    check_unchanged(header)
    split_into_shards(folder)
    sharded = read_model_header(folder)
    assert set(sharded.tensors) == set(header.tensors)
    with pytest.raises(CheckpointError, match="changed since"):
        check_unchanged(header)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x01\x02", "truncated"),
        (struct.pack("<Q", 1 << 63), "claims"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "claims"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (b"PK\x03\x04" + b"\0" * 60, "zip archive"),
        (b"\x80\x04\x95" + b"\0" * 60, "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 3) + b"\xff\xfe{", "not UTF-8"),
        (struct.pack("<Q", 4) + b'{"a"', "damaged JSON"),
        (struct.pack("<Q", 7) + b'{"a":\x00}', "damaged JSON"),
    ],
)
def test_files_that_are_no_safetensors(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_model_header(folder)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(), "b": entry(2, 6)}, b"12345678", "overlaps"),
        ({"a": entry(), "b": entry(6, 10)}, b"1234567890", "gap"),
        ({"a": entry(0, 4)}, b"12", "truncated or still being written"),
        ({"a": entry(0, 4)}, b"123456", "after the last tensor"),
        ({"a": entry(0, 8)}, b"12345678", "needs 4 bytes"),
        ({"a": entry(0, 4, (1 << 61, 1 << 61))}, b"1234", "needs"),
        ({"a": entry(0, 4, (-1,))}, b"1234", "whole numbers"),
        ({"a": entry(0, 4, (1.0,))}, b"1234", "whole numbers"),
        ({"a": entry(True, 4)}, b"1234", "whole numbers"),
        ({"a": entry(1 << 70, (1 << 70) + 4)}, b"1234", "whole numbers"),
        ({"a": entry(0, 4, (1,), "F4")}, b"1234", "unknown dtype 'F4'"),
        ({"a": entry(0, 4, (4,), "F8_E4M3")}, b"1234", "quantised"),
        ({"a": {"dtype": "F32"}}, b"", "expected dtype, shape"),
        ({"a": 3}, b"", "expected dtype, shape"),
        ({"__metadata__": 3}, b"", "__metadata__"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), b"1234", "'a' stands twice"),
        ({}, b"", "hold no tensor"),
        ({"layers.0.q.qweight": entry()}, b"1234", "quantised"),
        ({"q_proj.lora_A.weight": entry()}, b"1234", "LoRA adapter"),
    ],
)
def test_malformed_headers(folder, header, data, message):
    raw(folder / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        read_model_header(folder)


def test_header_with_100000_entries_is_read(tmp_path):
    header = {f"t{i}": entry(4 * i, 4 * i + 4) for i in range(100_000)}
    raw(tmp_path / "x.safetensors", header, b"\0" * 400_000)
    assert len(read_safetensors_header(tmp_path / "x.safetensors", "x.safetensors")) == 100_000


def test_truncated_shard(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        read_model_header(folder)


def test_index_and_shards(folder):
    weight_map, files = split_into_shards(folder)
    name = next(iter(weight_map))

    def refuse(changed, message):
        write_index(folder, changed)
        with pytest.raises(CheckpointError, match=message):
            read_model_header(folder)

    refuse(weight_map | {"ghost": files[0]}, "ghost")
    refuse(weight_map | {name: files[1]}, "does not")
    refuse({key: value for key, value in weight_map.items() if key != name}, "does not list")
    for bad in ("/etc/passwd", "../x.safetensors", "sub/x.safetensors", "..", "", "a\x00b"):
        refuse(weight_map | {name: bad}, "not a file in the model folder")
    refuse(weight_map | {name: "gone.safetensors"}, r"gone\.safetensors is missing")
    refuse({}, "weight_map")
    refuse({name: 3}, "weight_map")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        read_model_header(folder)


def test_tensor_in_two_shards(folder):
    files = split_into_shards(folder)[1]
    from safetensors.torch import load_file, save_file

    first, second = (load_file(folder / file) for file in files)
    name = next(iter(first))
    save_file({**second, name: first[name].clone()}, folder / files[1])
    with pytest.raises(CheckpointError, match="stands in two files"):
        read_model_header(folder)


def test_links(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the model folder"):
        read_model_header(folder)
    hub = tmp_path / "models--org--name"
    snapshot = hub / "snapshots" / "abc"
    (hub / "blobs").mkdir(parents=True)
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.move(outside, hub / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to(hub / "blobs" / "0123")
    assert read_model_header(snapshot).n_layers == 2


def test_folders_that_hold_no_plain_model(folder, tmp_path):
    def refuse(path, message):
        with pytest.raises(CheckpointError, match=message):
            read_model_header(path)

    refuse(tmp_path / "nowhere", "no such model folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"no config\.json")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refuse(tmp_path / "empty", "is a LoRA adapter")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "weights_only=True")
    (folder / "pytorch_model.bin").unlink()
    refuse(folder, "no safetensors weights")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged JSON"),
        ("[]", "JSON object"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": NaN}', "damaged JSON"),
        ("[" * 100_000, "damaged JSON"),
        ('{"auto_map": {"AutoModel": "x.Y"}}', "trust_remote_code"),
        ('{"quantization_config": {"quant_method": "awq"}}', "quantised"),
    ],
)
def test_bad_configs(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_model_header(folder)


def test_trusted_remote_code_is_accepted(folder):
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_model_header(folder, trust_remote_code=True).n_layers == 2


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 300))
def test_random_damage_never_escapes_the_error_tree(tmp_path_factory, noise, position):
    header = json.dumps({"a": entry(0, 8, (2,)), "b": entry(8, 12)}).encode()
    good = struct.pack("<Q", len(header)) + header + b"123456789012"
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(good[:position] + noise + good[position + len(noise) :])
    with contextlib.suppress(CheckpointError):
        read_safetensors_header(path, "x")
