"""Tensor names, shapes and values of the checkpoint folder an engine was started from.

Reads safetensors only, without validating it: `evomerge.plan` checks users' checkpoints.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from evomerge.core import CheckpointError
from evomerge.plan.model_header import is_derived


class CheckpointFolder:
    """The tensors of a Hugging Face folder (one `model.safetensors`, or shards with an index), memory-mapped; derived tensors (`is_derived`) are left out.

    Raises:
        CheckpointError: there is no safetensors file, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _shards(folder):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if is_derived(name):
                        continue
                    self._file_of[name] = file
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                self._stack.close()
                raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU, in its stored dtype."""
        value: torch.Tensor = self._file_of[name].get_tensor(name)
        return value


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return sorted({folder / str(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors shards ({error!r})") from error
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder}: there is neither model.safetensors nor model.safetensors.index.json")
    return [single]
