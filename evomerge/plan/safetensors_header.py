"""Reads the header of one untrusted safetensors file. Reads no weights and validates every number.

Format: 8 bytes (little-endian length N), N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the data.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.core import CheckpointError
from evomerge.plan.model_header import BYTES_OF_DTYPE, TensorHeader

MAX_HEADER_BYTES = 100_000_000
"""the limit of the safetensors library itself"""

_MAGIC = {
    b"PK\x03\x04": "a zip archive (a pickle checkpoint of PyTorch)",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull` in its repository",
}


def read_safetensors_header(path: Path, file: str) -> dict[str, TensorHeader]:
    """The tensors of one file, in the order of their data.

    Args:
        path: the file.
        file: the file's name in the returned headers.

    Raises:
        CheckpointError: the file is truncated or not a safetensors file, or its header is malformed; the message says how.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: {_what_it_is(first + stream.read(32), length, size)}")
        text = stream.read(length)
    entries = parse_json(text, str(path))
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; the file is damaged, download it again")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ of its header is not an object")
    tensors = [_tensor(name, entry, path, file, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_offsets(tensors, path, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def parse_json(text: bytes, where: str) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN.

    Raises:
        CheckpointError: `text` is anything else.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: JSON that is not UTF-8; the file is damaged, download it again") from None
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where}: damaged JSON ({problem}); download the file again") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _what_it_is(start: bytes, length: int, size: int) -> str:
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return f"is not a safetensors file but {kind}"
    if length > MAX_HEADER_BYTES:
        return f"its header claims {length} bytes; the limit is {MAX_HEADER_BYTES}: it is not a safetensors file or is damaged"
    return f"truncated: the header needs {length} bytes, but the file has {size}; download it again"


def _tensor(name: str, entry: Any, path: Path, file: str, data_start: int) -> TensorHeader:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets in its header entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype.startswith("F8"):
        raise CheckpointError(f"{where} is quantised ({dtype}); merge the original weights instead")
    if not isinstance(dtype, str) or dtype not in BYTES_OF_DTYPE:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(BYTES_OF_DTYPE)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape {shape!r} and data_offsets {offsets!r} must be lists of whole numbers")
    start, end = offsets
    expected = math.prod(shape) * BYTES_OF_DTYPE[dtype]
    if end - start != expected:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} needs {expected} bytes, but its offsets [{start}, {end}] span {end - start}"
        )
    return TensorHeader(name, tuple(shape), dtype, file, data_start + start, data_start + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 1 << 62 for entry in value
    )


def _check_offsets(tensors: list[TensorHeader], path: Path, data_start: int, size: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} {kind} (starts at byte {tensor.start}, expected {end}); the file is malformed"
            )
        end = tensor.end
    if end > size:
        raise CheckpointError(
            f"{path}: truncated or still being written: its tensors need {end} bytes, but the file has {size}; download it again"
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor; the file is malformed")
