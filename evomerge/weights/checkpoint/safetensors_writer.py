"""Writes safetensors shards in one pass: sizes are known beforehand, so each tensor is written as soon as it is computed."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.core import atomic_write_json
from evomerge.plan.model_folder import INDEX_NAME
from evomerge.weights.checkpoint.uncached_file import BLOCK_BYTES, UncachedFile
from evomerge.weights.mapping import TORCH_DTYPES

_NAME_OF = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """Name, shape and dtype of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Its size in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], multiple: int) -> bytes:
    """The beginning of a safetensors file, padded so that the data starts at a multiple of `multiple` bytes.

    Args:
        tensors: (name, safetensors name of the dtype, shape, size in bytes), in the order of the data.
    """
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, n_bytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


def split_into_shards(outputs: Sequence[OutputSpec], shard_bytes: int) -> list[list[OutputSpec]]:
    """Consecutive groups of at most `shard_bytes`; a larger tensor gets its own shard."""
    shards: list[list[OutputSpec]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.n_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.n_bytes
    return shards


def write_shards(
    folder: Path, outputs: Sequence[OutputSpec], tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> None:
    """Write `tensors` as `model.safetensors` or as shards with an index. They must come in the order of `outputs`, each whole or in consecutive flat parts.

    Raises:
        OSError: the disk is full or read-only.
        RuntimeError: `tensors` does not match `outputs`.
    """
    shards = split_into_shards(outputs, shard_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        with UncachedFile(folder / file) as handle:
            entries = [(output.name, _NAME_OF[output.dtype], output.shape, output.n_bytes) for output in shard]
            handle.write(
                header_bytes(entries, BLOCK_BYTES)
            )  # aligned, so that large tensors can be written without a copy
            for output in shard:
                _write_tensor(handle, output, stream)
                weight_map[output.name] = file
    for name, _ in stream:  # also lets the producer finish: it checks its sources once more
        raise RuntimeError(f"{name} is not an output")
    if len(shards) > 1:
        total = sum(output.n_bytes for output in outputs)
        atomic_write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tensor(handle: UncachedFile, output: OutputSpec, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write the parts from `stream` that make up `output`."""
    missing = torch.Size(output.shape).numel()
    while True:
        name, tensor = next(stream)
        missing -= tensor.numel()
        fits = tuple(tensor.shape) == output.shape or tensor.dim() == 1
        if name != output.name or tensor.dtype != output.dtype or not fits or missing < 0:
            raise RuntimeError(f"expected {output}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        handle.write(_bytes_of(tensor))
        if missing == 0:
            return


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
