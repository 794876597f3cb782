"""The folder from which an engine with room for `n_slots` layers is started: a model's files with more layers and no weights.

The weights are a hole in the file, which takes no disk space and is read as zeros. They are replaced before anything is scored.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from evomerge.core import atomic_write_json
from evomerge.plan import ModelHeader, TensorHeader
from evomerge.plan.layers import layer_name
from evomerge.weights.checkpoint.merged_config import with_layers
from evomerge.weights.checkpoint.safetensors_writer import header_bytes

_OTHER_WEIGHTS = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth")
"""weights in formats that are not read, so that they need not be copied"""

_ALIGNMENT = 8
"""alignment of the data in bytes, as in the safetensors library"""


def write_slots_folder(folder: Path, header: ModelHeader, n_slots: int) -> None:
    """Make `folder` (which must exist) a checkpoint of `n_slots` layers like those of `header`, all weights zero.

    Args:
        folder: the target folder.
        header: the model; its first layer is the template of every layer.
        n_slots: number of layers of the result.

    Raises:
        OSError: the folder cannot be written.
    """
    for path in header.folder.iterdir():
        is_weights = ".safetensors" in path.name or path.suffix in _OTHER_WEIGHTS
        if path.is_file() and path.name != "config.json" and not is_weights:
            shutil.copyfile(path, folder / path.name)
    atomic_write_json(folder / "config.json", with_layers(header.config, [0] * n_slots))
    tensors = [
        (name, tensor.dtype, tensor.shape, tensor.end - tensor.start)
        for name, tensor in _tensors(header, n_slots).items()
    ]
    beginning = header_bytes(tensors, _ALIGNMENT)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(beginning)
        stream.truncate(len(beginning) + sum(n_bytes for *_, n_bytes in tensors))


def _tensors(header: ModelHeader, n_slots: int) -> Mapping[str, TensorHeader]:
    found: dict[str, TensorHeader] = {}
    for name, tensor in header.tensors.items():
        layer = layer_name(name)
        if layer is None:
            found[name] = tensor
        elif layer.index == 0:
            found |= {layer.renumbered(index): tensor for index in range(n_slots)}
    return found
