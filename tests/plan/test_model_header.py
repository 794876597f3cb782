"""Reading the description of a model folder; tests/hostile covers damaged and malicious folders."""

import contextlib
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.core import CheckpointError
from evomerge.plan import chat_template_of, check_unchanged, read_model_header
from evomerge.plan.safetensors_header import read_safetensors_header
from evomerge.testing.tiny_models import write_tiny_llama


@pytest.fixture
def folder(tmp_path):
    return write_tiny_llama(tmp_path / "model", seed=1)


def entry(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def split_into_shards(folder):
    """Two shards and an index, in Hugging Face's format."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, part in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in zip(files, halves, strict=True) for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_header_of_a_valid_model_is_read(folder):
    header = read_model_header(folder)
    assert (header.n_layers, header.tied, header.vocab_size, header.dtype) == (2, True, 128, "bfloat16")
    assert header.architecture == "LlamaForCausalLM"
    check_unchanged(header)
    split_into_shards(folder)
    sharded = read_model_header(folder)
    assert set(sharded.tensors) == set(header.tensors)
    with pytest.raises(CheckpointError, match="changed since"):
        check_unchanged(header)


@pytest.mark.parametrize("name", ["Llama\nengine: transformers\n#", "\x1b[2JLlama", "Llama\u2028seed: 3", 7])
def test_architecture_name_that_is_not_printable_on_one_line_is_ignored(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    assert read_model_header(folder).architecture == "llama"


def test_output_layer_that_differs_from_the_embedding_is_separate(tmp_path):
    """If config.json does not say whether they are tied: transformers 4 omitted this."""
    folder = write_tiny_llama(tmp_path / "own", seed=1, tied=False, tie_word_embeddings=None)
    header = read_model_header(folder)
    assert (header.head, header.copied_head, header.tied) == ("lm_head.weight", None, False)


def test_default_chat_template_is_found_among_malformed_ones(folder):
    header = read_model_header(folder)
    named = [{"name": ["x"], "template": "a"}, "b", {"name": "default", "template": "c"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template_of(header) == "c"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:2]}))
    assert chat_template_of(header) is None


def test_folders_without_a_model_are_refused(folder, tmp_path):
    def refuse(path, message):
        with pytest.raises(CheckpointError, match=message):
            read_model_header(path)

    refuse(tmp_path / "nowhere", "no such model folder")
    refuse(tmp_path / ("long" * 100), "cannot be read: File name too long")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"no config\.json")
    (folder / "model.safetensors").unlink()
    refuse(folder, "no safetensors weights")
    for text, message in (("{", "damaged JSON"), ("[]", "JSON object")):
        (folder / "config.json").write_text(text)
        refuse(folder, message)


@settings(max_examples=200)
@given(st.binary(max_size=400), st.integers(0, 300))
def test_random_damage_raises_only_checkpoint_errors(tmp_path_factory, noise, position):
    header = json.dumps({"a": entry(0, 8, (2,)), "b": entry(8, 12)}).encode()
    good = struct.pack("<Q", len(header)) + header + b"123456789012"
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(good[:position] + noise + good[position + len(noise) :])
    with contextlib.suppress(CheckpointError):
        read_safetensors_header(path, "x")
