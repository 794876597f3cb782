"""Model headers as JSON: a run records them so that its recipes can be built on machines without the models."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.core import CheckpointError, Json
from evomerge.plan.model_header import BYTES_OF_DTYPE, ModelHeader, TensorHeader


def headers_to_json(headers: Mapping[str, ModelHeader]) -> dict[str, Json]:
    """Model key in recipes -> its folder, its config.json, and [name, dtype, shape] of every tensor, in order."""
    return {
        key: {
            "folder": str(header.folder),
            "config": header.config,
            "tensors": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in header.tensors.values()],
        }
        for key, header in headers.items()
    }


def headers_from_json(data: Any, where: str) -> dict[str, ModelHeader]:
    """The headers that were passed to `headers_to_json`, as far as spaces and plans need them: without files and adapters, so weights cannot be read.

    Args:
        data: result of `headers_to_json`.
        where: the file, for messages.

    Raises:
        CheckpointError: `data` does not have that form.
    """
    try:
        return {
            str(key): ModelHeader(Path(model["folder"]), dict(model["config"]), _tensors(model["tensors"]), {})
            for key, model in data.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not the models of a run: {error!r}") from None


def _tensors(rows: list[Any]) -> dict[str, TensorHeader]:
    tensors = {}
    for name, dtype, shape in rows:
        n_bytes = math.prod(shape) * BYTES_OF_DTYPE[dtype]
        tensors[name] = TensorHeader(name, tuple(shape), dtype, "", 0, n_bytes)
    return tensors
