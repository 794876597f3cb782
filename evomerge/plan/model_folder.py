"""Reads and validates the metadata of a Hugging Face model folder: config.json, the shard index and every shard's header."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.core import CheckpointError, nearest, why_unreadable
from evomerge.plan.model_header import FLOAT_DTYPES, FileStamp, ModelHeader, TensorHeader, config_value, is_derived
from evomerge.plan.safetensors_header import parse_json, read_safetensors_header

INDEX_NAME = "model.safetensors.index.json"

MAX_JSON_BYTES = 100_000_000
"""Size limit of config.json and of the index; the index of a model with 100,000 tensors has about 10 MB"""

_COMPARED_BYTES = 1 << 16
"""bytes at the start of the output layer and the embedding that are compared to see whether one is a copy of the other"""

_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
_LOADED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""files that some loaders read without consulting the index"""

_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_scale|weight_scale_inv|weight_packed|absmax|SCB)$|\.weight\.absmax$"
)
_QUANTISED_CONFIG = ("quantization_config", "quantization", "compression_config")
"""keys of config.json: those of transformers, of MLX, and the old one of llm-compressor"""

_BUFFER_DTYPES = ("I64", "BOOL")
"""types of counters, positions and masks; narrower integers are packed weights"""


def read_model_header(folder: Path | str, *, trust_remote_code: bool = False) -> ModelHeader:
    """The metadata of the model in `folder`.

    Args:
        folder: a Hugging Face checkpoint with safetensors weights.
        trust_remote_code: accept a config that refers to custom Python code (`auto_map`); evomerge itself never runs it.

    Raises:
        CheckpointError: the folder is missing, unreadable, incomplete, damaged, unsafe (paths or links that leave it, pickles, remote
            code) or not a plain model (a LoRA adapter, a quantised model).
    """
    with unreadable_as_error(Path(folder)):
        return _read_header(Path(folder), trust_remote_code)


@contextmanager
def unreadable_as_error(place: Path) -> Iterator[None]:
    """Convert an OSError while reading a model's files in (or at) `place` into an error that names the file.

    Raises:
        CheckpointError: instead of OSError.
    """
    try:
        yield
    except OSError as problem:
        raise CheckpointError(f"{problem.filename or place}: {why_unreadable(problem)}") from None


def _read_header(folder: Path, trust_remote_code: bool) -> ModelHeader:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder{_what_instead(folder)}")
    config = _read_config(folder, trust_remote_code)
    shards = _shards(folder)
    tensors: dict[str, TensorHeader] = {}
    files: dict[str, FileStamp] = {}
    for file in dict.fromkeys(shards.values()) if isinstance(shards, Mapping) else [shards]:
        path = file_inside(folder, file)
        for name, tensor in read_safetensors_header(path, file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: tensor {name!r} is in two files, {tensors[name].file} and {file}")
            tensors[name] = tensor
        files[file] = file_stamp(path)
    if isinstance(shards, Mapping):
        _check_index(folder, shards, tensors)
    _check_plain(folder, tensors)
    header = ModelHeader(folder, config, {name: tensors[name] for name in tensors if not is_derived(name)}, files)
    return _without_copied_head(header)


_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has tokenizer files. Does not read them."""
    return any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern))


def check_tokenizer(folder: Path) -> None:
    """Check that a model folder has tokenizer files. Does not read them.

    Raises:
        CheckpointError: there are none.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder}: has no tokenizer (tokenizer.json, ...), which is needed to encode prompts; copy the tokenizer files of a model with "
            "the same vocabulary into it, such as the model it was fine-tuned from"
        )


def _what_instead(folder: Path) -> str:
    """A hint about a folder that does not exist: a misspelt name, or not a path of this machine."""
    if "$" in str(folder) or "~" in folder.parts:
        return "; environment variables are not expanded here, and ~ only at the start of a path: write the path out"
    if folder.is_file():
        return ": it is a file"
    if folder.parent.is_dir():
        beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
        near = nearest(folder.name, beside)
        return f"; did you mean {near[0]!r}?" if near else ""
    return "; give a folder, or a model in the hub's cache on this machine: `hf download ORG/NAME` downloads one"


def file_stamp(path: Path) -> FileStamp:
    """Size, modification time and inode of `path` (following links)."""
    status = path.stat()
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)


def check_unchanged(header: ModelHeader) -> None:
    """Refuse a model whose files have been replaced or modified since its header was read.

    Raises:
        CheckpointError: names the file.
    """
    folders = [(header.folder, header.files)]
    if header.adapter is not None:
        folders.append((header.adapter.folder, header.adapter.files))
    for path, stamp in [(folder / file, stamp) for folder, files in folders for file, stamp in files.items()]:
        if not path.is_file() or file_stamp(path) != stamp:
            raise CheckpointError(
                f"{path}: changed since it was first read; models must not change during a run: start again with a complete copy"
            )


def read_json_file(path: Path) -> Any:
    """Parse a strict JSON file of at most `MAX_JSON_BYTES`.

    Raises:
        CheckpointError: the file is missing or too large, or as for `parse_json`.
    """
    with unreadable_as_error(path):
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; the limit is {MAX_JSON_BYTES}")
        return parse_json(path.read_bytes(), str(path))


def _read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder}: is a LoRA adapter, not a model; give it as the `lora` of its base model ('BASE+{folder}')"
            )
        raise CheckpointError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    config = read_json_file(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected a JSON object")
    if config.get("auto_map") and not trust_remote_code:
        raise CheckpointError(
            f"{folder / 'config.json'}: 'auto_map' requires code from the model's repository, which evomerge never runs, so a search "
            "cannot use the model; `evomerge merge --trust-remote-code` merges it without running the code and copies the code along"
        )
    for key in _QUANTISED_CONFIG:
        if config.get(key):
            raise CheckpointError(
                f"{folder / 'config.json'}: the model is quantised ({key}); merge the original weights instead"
            )
    return config


def _shards(folder: Path) -> Mapping[str, str] | str:
    """The index's tensor -> file mapping, or the name of the only file."""
    if (folder / INDEX_NAME).exists():
        index = read_json_file(folder / INDEX_NAME)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_NAME}: expected an object with a non-empty 'weight_map'")
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX_NAME}: 'weight_map' must map tensor names to file names")
        named = set(weight_map.values())
        stray = next((name for name in _weight_files(folder) if _LOADED.fullmatch(name) and name not in named), None)
        if stray is not None:
            raise CheckpointError(
                f"{folder}: {INDEX_NAME} does not list {stray}, so different programs would load different weights; "
                "delete whichever is outdated, the weights or the index"
            )
        return weight_map
    names = _weight_files(folder)
    if "model.safetensors" in names:
        return "model.safetensors"
    if any(_SHARD.search(name) for name in names):
        raise CheckpointError(
            f"{folder}: has shards ({names[0]}, ...) but no {INDEX_NAME}; download it from the model's repository"
        )
    if len(names) == 1 and names[0] != "adapter_model.safetensors":
        return names[0]
    if names == ["adapter_model.safetensors"]:
        raise CheckpointError(
            f"{folder}: contains a LoRA adapter but no model weights; give it as the `lora` of its base"
        )
    if names:
        raise CheckpointError(f"{folder}: has several safetensors files and no {INDEX_NAME}: {', '.join(names[:5])}")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: has only pickled weights, which can run code when loaded; convert them in a sandbox you trust: "
            'python -c "import torch, safetensors.torch as s; '
            "s.save_file(torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors')\""
        )
    raise CheckpointError(f"{folder}: has no safetensors weights (model.safetensors or {INDEX_NAME})")


def _without_copied_head(header: ModelHeader) -> ModelHeader:
    """The header without the output layer if it is a stored copy of the tied embedding; otherwise the header unchanged.

    Compares only the beginning of the two tensors; the code that reads the weights compares the rest.
    """
    tied = header.config.get("tie_word_embeddings", config_value(header.config, "tie_word_embeddings"))
    head, embedding = header.head, header.embedding
    if tied is False or head is None or embedding is None:
        return header
    one, other = header.tensors[head], header.tensors[embedding]
    if (one.shape, one.dtype) == (other.shape, other.dtype) and _start(header, one) == _start(header, other):
        return replace(
            header, tensors={name: header.tensors[name] for name in header.tensors if name != head}, copied_head=one
        )
    if tied:
        raise copy_differs(header, one)
    return header


def _start(header: ModelHeader, tensor: TensorHeader) -> bytes:
    with (header.folder / tensor.file).open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(min(tensor.end - tensor.start, _COMPARED_BYTES))


def copy_differs(header: ModelHeader, head: TensorHeader) -> CheckpointError:
    """The error for a tied model that stores an output layer different from its embedding."""
    return CheckpointError(
        f"{header.folder}: config.json ties the output layer to the embedding, but the weights contain a different one ({head.name}), so "
        "programs differ in which they use; set tie_word_embeddings: false in config.json to keep it, or remove the tensor from the file"
    )


def _weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def file_inside(folder: Path, file: str) -> Path:
    """The path of a file that must be in `folder` (or in the blob store of the Hugging Face cache it belongs to).

    Raises:
        CheckpointError: `file` is not a plain name, is missing, or is a link that leaves the folder.
    """
    if file in ("", ".", "..") or "/" in file or "\\" in file or "\x00" in file:
        raise CheckpointError(
            f"{folder}: the index names {file!r}, which is not a file in the model folder; do not use this model"
        )
    path = folder / file
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: shard {file} is missing or not a file; download it from the model's repository"
        )
    target, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(f"{path}: is a link to {target}, outside the model folder; copy the file into the folder")
    return path


def _check_index(folder: Path, index: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"{folder / INDEX_NAME}: lists tensor {name!r} in {file}, which does not contain it")
    extra = next((name for name in tensors if name not in index), None)
    if extra is not None:
        raise CheckpointError(
            f"{folder}: {tensors[extra].file} contains tensor {extra!r}, which {INDEX_NAME} does not list"
        )


def _check_plain(folder: Path, tensors: Mapping[str, TensorHeader]) -> None:
    if not tensors:
        raise CheckpointError(f"{folder}: its safetensors files contain no tensors")
    for name, tensor in tensors.items():
        packed = tensor.dtype not in FLOAT_DTYPES and tensor.dtype not in _BUFFER_DTYPES and not is_derived(name)
        if packed or _QUANTISED.search(name):
            raise CheckpointError(
                f"{folder}: tensor {name!r} ({tensor.dtype}) shows that the model is quantised; merge the original weights instead"
            )
        if ".lora_A." in name or ".lora_B." in name:
            raise CheckpointError(f"{folder}: tensor {name!r} belongs to a LoRA adapter; give the folder as a `lora`")
