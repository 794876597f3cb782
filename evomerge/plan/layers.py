"""Finds the layer of a tensor from its name.

`model.layers.3.mlp.up_proj.weight` is `mlp.up_proj.weight` of layer 3 of the stack `model.layers`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from evomerge.core import CheckpointError
from evomerge.plan.model_header import ModelHeader, config_value

_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_BEFORE = re.compile(r"embed(?!_out\.|ding_norm\.)|(^|\.)wte\.|(^|\.)wpe\.")
"""embeddings and related tensors; not GPT-NeoX's output layer `embed_out`, and not LFM2's final `embedding_norm`"""


@dataclass(frozen=True, slots=True)
class LayerName:
    """A tensor of layer `index` of `stack`, called `rest` within the layer."""

    stack: str
    index: int
    rest: str

    def renumbered(self, index: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}.{index}.{self.rest}"


@lru_cache(maxsize=1 << 17)
def layer_name(tensor: str) -> LayerName | None:
    """The layer of `tensor`; None if it is outside the layers."""
    match = _LAYER.match(tensor)
    return LayerName(match[1], int(match[2]), match[3]) if match else None


def is_before_layers(tensor: str) -> bool:
    """Whether a tensor outside the layers comes before them (an embedding); the others come after."""
    return _BEFORE.search(tensor) is not None


def stack_sizes(tensors: Iterable[str]) -> dict[str, int]:
    """Stack name -> number of layers (highest index + 1)."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        layer = layer_name(tensor)
        if layer is not None:
            sizes[layer.stack] = max(sizes.get(layer.stack, 0), layer.index + 1)
    return sizes


def main_stack(header: ModelHeader, sizes: Mapping[str, int]) -> str | None:
    """The stack of the language model's layers; None if the model has no layers.

    Raises:
        CheckpointError: config.json and the weights disagree about the number of layers.
    """
    if not sizes:
        return None
    text = [name for name in sizes if "vision" not in name and "visual" not in name and "audio" not in name]
    # multi-token-prediction layers come after the others and are not counted in the config (DeepSeek-V3, GLM-4.5)
    further = config_value(header.config, "num_nextn_predict_layers")
    depths = (header.n_layers, header.n_layers + further if isinstance(further, int) else header.n_layers)
    matching = [name for name in text if sizes[name] in depths]
    if not matching and header.n_layers:
        found = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise CheckpointError(f"{header.folder}: config.json says {header.n_layers} layers, the weights have {found}")
    found_stacks = matching or text or list(sizes)
    return next((name for name in found_stacks if "decoder" in name), found_stacks[0])
