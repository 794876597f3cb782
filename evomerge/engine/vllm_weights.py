"""The live weights of a vLLM engine: of a model in this process, or of its shards in vLLM's worker processes.

Both use the same layout discovery. No tensors are sent between processes: each worker is told what to compute
(`RemoteWrite`) and writes its own shard. Knows nothing of requests or answers.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
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

logger = logging.getLogger(__name__)

_PLAIN_EXPERTS = {"TRITON", "BATCHED_TRITON"}
"""vLLM's backends for unquantised experts (`UnquantizedMoeBackend`) that use the weights in the layout in which they are loaded"""

_MOST_NESTED = 3
"""Depth to which the objects that modules hold are searched for copies of weights."""

_NO_HOLDERS = (torch.nn.Module, type, ModuleType)
"""Types that are not searched; the model's modules are each visited anyway."""

_PROBE_ELEMENTS = 1 << 20
"""Approximate number of elements of each parameter that are compared with their values from before layout discovery."""


class LiveWeights(Protocol):
    """The operations of an engine on its weights."""

    def write(self, write: Callable[[WeightTarget], None]) -> None:
        """Replace them. Exceptions from `write` propagate."""
        ...

    def clear_caches(self) -> None:
        """Zero the key-value cache, which NaN weights have filled with NaN."""
        ...


class ModelWeights:
    """The weights of a model in this process.

    Args:
        model: vLLM's module: the whole model, or one shard of it.
        checkpoint: the checkpoint it was loaded from.
        whole: whether every tensor must be held completely.

    Raises:
        EngineError: the weights are packed, permuted, copied, or changed by vLLM after loading.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: CheckpointFolder, *, whole: bool) -> None:
        check_writable_cpu_linears(model)
        check_plain_experts(model)
        self._model = model
        live = without_aliases(
            {name: value.data for name, value in [*model.named_parameters(), *model.named_buffers()]}
        )
        check_no_copies(model)
        before = {name: _sample(value).clone() for name, value in live.items()}
        with torch.no_grad():
            load = _in_place(model, live)
            self._layout = discover_layout(live, checkpoint.shapes, load, whole=whole, reload=True)
            self._layout.fill(checkpoint.tensor)
        for name, value in live.items():
            if not torch.equal(_sample(value).nan_to_num(), before[name].nan_to_num()):
                raise EngineError(
                    f"vLLM parameter {name!r} differs from the checkpoint: vLLM transforms it after loading, "
                    "so it cannot be replaced in place. Use the transformers engine for this model"
                )
        if self._layout.ignored:
            logger.info("vLLM keeps no copy of %s", ", ".join(self._layout.ignored))
        if self._layout.reloaded:
            logger.info("vLLM's loader changes the form of %s", ", ".join(self._layout.reloaded))

    def n_elements(self) -> dict[str, int]:
        """The number of elements of each checkpoint tensor that this process holds."""
        regions = {name: self._layout.regions(name) for name in self._layout.names()}
        return {name: sum(region.view.numel() for region in found) for name, found in regions.items()}

    def write(self, write: Callable[[WeightTarget], None]) -> None:
        """See `LiveWeights.write`."""
        with torch.no_grad():
            write(self._layout)
            self._layout.settle()

    def clear_caches(self) -> None:
        """See `LiveWeights.clear_caches`."""
        for module in self._model.modules():
            cache = getattr(module, "kv_cache", None)
            # layers with a recurrent state instead of keys and values have several tensors
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()


class ShardedWeights:
    """The weights of an engine whose shards are in worker processes, which have the extension `vllm_shard.Shard`.

    Args:
        llm: the running engine.
        model: the checkpoint folder it was started from.
        shapes: shapes of the checkpoint's tensors.

    Raises:
        EngineError: as for `ModelWeights`, or the shards together hold only part of a tensor.
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
            EngineError: `write` is not a `RemoteWrite`, or fails in a worker process.
        """
        if not isinstance(write, RemoteWrite):
            raise EngineError(
                "a tensor-parallel engine can only be updated with a RemoteWrite, which each of its processes can apply"
            )
        self._ask("evomerge_write", write.function, canonical_json(write.settings))

    def clear_caches(self) -> None:
        """See `LiveWeights.clear_caches`."""
        self._ask("evomerge_clear_caches")

    def _ask(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        """Call a method in all worker processes and return their answers; only text is exchanged.

        Raises:
            EngineError: a process reported an error; it has a cause if a library failed there.
        """
        answers = [json.loads(answer) for answer in self._llm.collective_rpc(method, args=arguments)]
        for answer in answers:
            if "error" in answer:
                raise EngineError(answer["error"]) from (RuntimeError(answer["error"]) if answer["broken"] else None)
        return answers


def _in_place(model: torch.nn.Module, live: Mapping[str, torch.Tensor]) -> Load:
    """The model's weight loader, made to write into `live` only: vLLM allocates the bias of an output layer anew at every load."""

    def load(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        load_weights: Any = model.load_weights
        load_weights(weights)
        for name, value in model.named_parameters():
            if name in live and value.data_ptr() != live[name].data_ptr():
                live[name].copy_(value)
                value.data = live[name]

    return load


def without_aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop tensors that lie within another one's memory, such as the halves of `kv_b_proj` that vLLM's latent attention multiplies by."""
    kept: dict[str, torch.Tensor] = {}
    spans: dict[int, list[tuple[int, int]]] = {}
    for name, value in sorted(
        tensors.items(), key=lambda item: -item[1].numel()
    ):  # stable: parameters come before buffers
        size = value.element_size()
        first = value.data_ptr()
        last = first + size * sum(
            stride * (length - 1) for stride, length in zip(value.stride(), value.shape, strict=True)
        )
        taken = spans.setdefault(value.untyped_storage().data_ptr(), [])
        if value.numel() and any(start <= first and last < end for start, end in taken):
            continue
        kept[name] = value
        if value.is_contiguous():  # otherwise elements of other tensors may lie between its own
            taken.append((first, last + size))
    return {name: kept[name] for name in tensors if name in kept}


def check_plain_experts(model: torch.nn.Module) -> None:
    """Check how vLLM stores the experts of a loaded model. Their values cannot tell if the engine was started from zeros, as for a stack of layers.

    Raises:
        EngineError: vLLM has reordered them.
    """
    for name, module in model.named_modules():
        backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None and backend.name not in _PLAIN_EXPERTS:
            raise EngineError(
                f"vLLM layer {name!r} stores its experts in the layout of {backend.value}, so they cannot be replaced in place; use "
                "engine.options: {moe_backend: triton} on a GPU, engine.kind: transformers on a CPU"
            )


def check_no_copies(model: torch.nn.Module) -> None:
    """Look for copies of weights that vLLM computes with instead of the parameters, in modules and the objects they hold (attention backends).

    For example, FlashInfer's attention keeps attention sinks in float32, which would remain those of the first model. A copy is recognised by
    its values, in any order and precision, unless all of them are equal.

    Raises:
        EngineError: naming the copy.
    """
    storages = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    by_size: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            by_size.setdefault(parameter.numel(), []).append((name, parameter.data))
    for place, tensor in _held_tensors(model):
        if tensor.untyped_storage().data_ptr() in storages or not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        for name, value in by_size.get(tensor.numel(), []):
            if _same_values(tensor, value):
                raise EngineError(
                    f"vLLM computes with a copy of parameter {name!r} ({place}), which would not change when the parameter is replaced; choose another "
                    "engine.options.attention_backend, or engine.kind: transformers"
                )


def _held_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in plain attributes of modules, and nested in objects held there (such as a composed attention backend)."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute, held in vars(module).items():
            yield from _tensors_in(held, f"{name}.{attribute}", _MOST_NESTED, seen)


def _tensors_in(held: object, place: str, depth: int, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    attributes = getattr(held, "__dict__", None)
    if isinstance(held, torch.Tensor):
        yield place, held
    elif depth and id(held) not in seen and isinstance(attributes, dict) and not isinstance(held, _NO_HOLDERS):
        seen.add(id(held))  # all layers hold the same configuration object
        for attribute, inner in list(attributes.items()):
            yield from _tensors_in(inner, f"{place}.{attribute}", depth - 1, seen)


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same values, in any order, and these are not all equal."""
    if one.device != other.device:
        return False
    low = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    first, second = (value.reshape(-1).to(low).sort().values for value in (one, other))
    return bool(first[0] != first[-1]) and torch.equal(first, second)


def _sample(value: torch.Tensor) -> torch.Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, flat.numel() // _PROBE_ELEMENTS)]
