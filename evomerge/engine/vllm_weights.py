"""The live weights of a vLLM engine: of the model in this process, or of its shards in vLLM's worker processes.

Both are written through the same layout discovery. Over processes no tensor travels: each worker is told what to compute
(`RemoteWrite`) and writes its own shard. Knows nothing of requests or answers.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from evomerge.core import EngineError, canonical_json
from evomerge.engine.base import RemoteWrite
from evomerge.engine.checkpoint import CheckpointFolder
from evomerge.engine.layout import Load, discover_layout
from evomerge.engine.patches import check_writable_cpu_linears
from evomerge.plan import WeightTarget

if TYPE_CHECKING:
    from vllm import LLM

_LOGGER = logging.getLogger(__name__)

_PROBE_ELEMENTS = 1 << 20
"""At most so many elements of each parameter are compared with their value before the layout was discovered."""


class LiveWeights(Protocol):
    """What an engine does with its weights."""

    def write(self, write: Callable[[WeightTarget], None]) -> None:
        """Replaces them. Passes on what `write` raises."""
        ...

    def clear_caches(self) -> None:
        """Zeroes the keys and values, which NaN weights have filled with NaN."""
        ...


class ModelWeights:
    """The weights of a model in this process.

    Args:
        model: vLLM's module: the whole model, or one shard of it.
        checkpoint: what it was loaded from.
        whole: whether every element of every tensor must be here.

    Raises:
        EngineError: the weights are packed, permuted, or changed by vLLM after loading.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: CheckpointFolder, *, whole: bool) -> None:
        check_writable_cpu_linears(model)
        self._model = model
        live = {name: value.data for name, value in [*model.named_parameters(), *model.named_buffers()]}
        before = {name: _sample(value).clone() for name, value in live.items()}
        with torch.no_grad():
            self._layout = discover_layout(live, checkpoint.shapes, _in_place(model, live), whole=whole)
            self._layout.fill(checkpoint.tensor)
        for name, value in live.items():
            if not torch.equal(_sample(value).nan_to_num(), before[name].nan_to_num()):
                raise EngineError(
                    f"vLLM parameter {name!r} differs from the checkpoint it was loaded from: vLLM transforms it after loading, "
                    "so it cannot be replaced in place. Use the transformers engine for this model"
                )
        if self._layout.ignored:
            _LOGGER.info("vLLM keeps no copy of %s", ", ".join(self._layout.ignored))

    def n_elements(self) -> dict[str, int]:
        """How many elements of each checkpoint tensor are here."""
        regions = {name: self._layout.regions(name) for name in self._layout.names()}
        return {name: sum(region.view.numel() for region in found) for name, found in regions.items()}

    def write(self, write: Callable[[WeightTarget], None]) -> None:
        """See `LiveWeights.write`."""
        with torch.no_grad():
            write(self._layout)

    def clear_caches(self) -> None:
        """See `LiveWeights.clear_caches`."""
        for module in self._model.modules():
            cache = getattr(module, "kv_cache", None)
            if isinstance(cache, torch.Tensor):
                cache.zero_()


class ShardedWeights:
    """The weights of an engine whose shards are in worker processes; those have `vllm_shard.Shard` mixed in.

    Args:
        llm: the running engine.
        model: the checkpoint folder it was started from.
        shapes: its tensors.

    Raises:
        EngineError: as `ModelWeights`, or the shards together do not hold a tensor whole.
    """

    def __init__(self, llm: "LLM", model: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._llm = llm
        held: dict[str, int] = {}
        for answer in self._ask("evomerge_discover", str(model)):
            for name, count in answer["elements"].items():
                held[name] = held.get(name, 0) + int(count)
        for name, count in held.items():
            if count < torch.Size(shapes[name]).numel():
                raise EngineError(
                    f"the engine's processes together keep only {count} of the {torch.Size(shapes[name]).numel()} elements of "
                    f"checkpoint tensor {name!r} in parameters that can be replaced"
                )

    def write(self, write: Callable[[WeightTarget], None]) -> None:
        """See `LiveWeights.write`.

        Raises:
            EngineError: `write` is no `RemoteWrite`, or fails in a worker process.
        """
        if not isinstance(write, RemoteWrite):
            raise EngineError(
                "a tensor-parallel engine is updated by a RemoteWrite, which its processes can each carry out"
            )
        self._ask("evomerge_write", write.function, canonical_json(write.settings))

    def clear_caches(self) -> None:
        """See `LiveWeights.clear_caches`."""
        self._ask("evomerge_clear_caches")

    def _ask(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        """The answers of all worker processes to a method of theirs; only text goes there and back."""
        answers = [json.loads(answer) for answer in self._llm.collective_rpc(method, args=arguments)]
        for answer in answers:
            if "error" in answer:
                raise EngineError(answer["error"])
        return answers


def _in_place(model: torch.nn.Module, live: Mapping[str, torch.Tensor]) -> Load:
    """The model's weight loader, which then writes into `live` alone: vLLM makes the bias of an output layer anew at every load."""

    def load(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        load_weights: Any = model.load_weights
        load_weights(weights)
        for name, value in model.named_parameters():
            if name in live and value.data_ptr() != live[name].data_ptr():
                live[name].copy_(value)
                value.data = live[name]

    return load


def _sample(value: torch.Tensor) -> torch.Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, flat.numel() // _PROBE_ELEMENTS)]
