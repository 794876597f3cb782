"""Safetensors files as torch tensors without copying: memory-mapped and shared between the processes of a machine."""

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from evomerge.core import CheckpointError
from evomerge.plan import ModelHeader, TensorHeader, check_unchanged
from evomerge.plan.model_folder import copy_differs
from evomerge.weights.adapters import apply_update

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedModel:
    """The tensors of one model, mapped on first use.

    Pages are private: a write to a tensor (a programming error) never reaches the file.

    Args:
        header: the model; its files must not have changed since it was read.
        maps: mapped files, to which newly mapped ones are added; shared by models of the same folder.

    Raises:
        CheckpointError: a file has changed, or a stored output layer that should equal the embedding does not.
    """

    def __init__(self, header: ModelHeader, maps: dict[Path, mmap.mmap] | None = None) -> None:
        check_unchanged(header)
        self.header = header
        self._maps = {} if maps is None else maps
        copy, embedding = header.copied_head, header.tensors.get(header.embedding or "")
        if copy is not None and embedding is not None:
            both = [self._tensor(header.folder, tensor) for tensor in (copy, embedding)]
            if not torch.equal(*(tensor.view(torch.uint8) for tensor in both)):
                raise copy_differs(header, copy)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, in the dtype and shape of the file, with the model's adapter merged in.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        return read_tensor(self.header, name, self._tensor)

    def _tensor(self, folder: Path, header: TensorHeader) -> torch.Tensor:
        dtype = TORCH_DTYPES[header.dtype]
        if header.start == header.end:
            return torch.empty(header.shape, dtype=dtype)
        count = (header.end - header.start) // dtype.itemsize
        buffer = self._map(folder / header.file)
        if header.start % dtype.itemsize:  # the format allows any alignment, torch does not
            copy = bytearray(buffer[header.start : header.end])
            return torch.frombuffer(copy, dtype=dtype).reshape(header.shape)
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=header.start).reshape(header.shape)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            self._maps[path] = _map_file(path)
        return self._maps[path]


ReadStored = Callable[[Path, TensorHeader], torch.Tensor]
"""(folder, header of a tensor in it) -> the tensor as stored"""

ReadTensor = Callable[[str, str], torch.Tensor]
"""(model, tensor name) -> tensor, as in the model's files"""


def read_tensor(header: ModelHeader, name: str, read: ReadStored) -> torch.Tensor:
    """Tensor `name` of a model, with its adapter merged in.

    Raises:
        CheckpointError: there is no such tensor, or as for `read`.
    """
    stored = header.tensors.get(name)
    if stored is None:
        raise CheckpointError(f"{header.folder}: has no tensor {name!r}")
    adapter = header.adapter
    if adapter is None:
        return read(header.folder, stored)
    own, update = adapter.replaced.get(name), adapter.updates.get(name)
    weight = read(header.folder, stored) if own is None else read(adapter.folder, own).to(TORCH_DTYPES[stored.dtype])
    if update is None:
        return weight
    magnitude = None if update.magnitude is None else read(adapter.folder, update.magnitude)
    return apply_update(weight, read(adapter.folder, update.a), read(adapter.folder, update.b), magnitude, update)


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path}: cannot be mapped: {problem}") from None
