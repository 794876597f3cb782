"""Where each checkpoint tensor lives in a model loaded by transformers.

Most parameters have the name of their checkpoint tensor. transformers renames and fuses others while loading (experts into one parameter, GPT-NeoX's
`embed_out`, the parts of multimodal models), differently in each version; their places are found by loading tags through its own loader.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from evomerge.engine.checkpoint import CheckpointFolder
from evomerge.engine.layout import EngineLayout, discover_layout
from evomerge.plan import Region

LoadAnother = Callable[[Mapping[str, torch.Tensor]], Any]
"""Loads another model of the running model's class from checkpoint tensors."""


def live_layout(model: torch.nn.Module, checkpoint: CheckpointFolder, load_another: LoadAnother) -> EngineLayout:
    """Address the model's own parameters and persistent buffers by checkpoint names.

    Args:
        model: loaded from `checkpoint`; unchanged afterwards.
        checkpoint: its tensors.
        load_another: called about a dozen times if names differ; needs the memory of a second model on the CPU.

    Raises:
        EngineError: a checkpoint tensor is not held as plain blocks in its own order.
    """
    live = model.state_dict(keep_vars=True)
    # Tied weights have several names; the first one in the model represents all those in the checkpoint.
    first_name = {value.data_ptr(): name for name, value in reversed(live.items())}
    layout = _by_names(live, first_name, checkpoint.shapes)
    if layout is not None:
        return layout
    once = {name: live[name] for name in first_name.values()}

    def load(pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
        loaded = load_another(dict(pairs)).state_dict()
        for name, value in once.items():
            value.copy_(loaded[name])

    with torch.no_grad():
        layout = discover_layout(once, checkpoint.shapes, load)
        layout.fill(checkpoint.tensor)
    return layout


def _by_names(
    live: Mapping[str, torch.Tensor], first_name: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]]
) -> EngineLayout | None:
    """The layout of a model whose parameters have the checkpoint's names and shapes; None if any differs."""
    regions: dict[str, list[Region]] = {}
    ignored = []
    for name, shape in shapes.items():
        value = live.get(name)
        if value is None or tuple(value.shape) != shape:
            return None
        stands_for = first_name[value.data_ptr()]
        if (stands_for != name and stands_for in shapes) or not value.is_floating_point():
            ignored.append(name)
        else:
            regions[name] = [Region(tuple(slice(0, size) for size in shape), value.data)]
    return EngineLayout(regions, ignored)
