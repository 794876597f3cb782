"""The live weights of a vLLM engine: of the model in this process, or of its shards in vLLM's worker processes.

Both are written through the same layout discovery. Over processes no tensor travels: each worker is told what to compute
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
"""vLLM's backends for unquantised experts (`UnquantizedMoeBackend`) that compute with the weights as they are loaded"""

_MOST_NESTED = 3
"""How deep copies of weights are looked for in the objects that modules hold."""

_NO_HOLDERS = (torch.nn.Module, type, ModuleType)
"""What is not looked into: modules of the model have a turn of their own."""

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
                    f"vLLM parameter {name!r} differs from the checkpoint it was loaded from: vLLM transforms it after loading, "
                    "so it cannot be replaced in place. Use the transformers engine for this model"
                )
        if self._layout.ignored:
            logger.info("vLLM keeps no copy of %s", ", ".join(self._layout.ignored))
        if self._layout.reloaded:
            logger.info("vLLM's loader changes the form of %s", ", ".join(self._layout.reloaded))

    def n_elements(self) -> dict[str, int]:
        """How many elements of each checkpoint tensor are here."""
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
            # layers with a state instead of keys and values have several tensors
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()


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
        """The answers of all worker processes to a method of theirs; only text goes there and back.

        Raises:
            EngineError: what a process has found wrong; with a cause where a library failed in it.
        """
        answers = [json.loads(answer) for answer in self._llm.collective_rpc(method, args=arguments)]
        for answer in answers:
            if "error" in answer:
                raise EngineError(answer["error"]) from (RuntimeError(answer["error"]) if answer["broken"] else None)
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


def without_aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each place in memory once: without tensors that lie within another, such as the halves of `kv_b_proj` that vLLM's latent attention multiplies by."""
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
        if value.is_contiguous():  # otherwise there may be others' elements between its own
            taken.append((first, last + size))
    return {name: kept[name] for name in tensors if name in kept}


def check_plain_experts(model: torch.nn.Module) -> None:
    """Looks at how the experts of a loaded model are kept. An engine that was started from zeros for a stack of layers does not show it in its values.

    Raises:
        EngineError: vLLM has put them in another order.
    """
    for name, module in model.named_modules():
        backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None and backend.name not in _PLAIN_EXPERTS:
            raise EngineError(
                f"vLLM layer {name!r} keeps its experts as {backend.value} wants them, so they cannot be replaced in place; on a GPU use "
                "engine.options: {moe_backend: triton}, on a CPU engine.kind: transformers"
            )


def check_no_copies(model: torch.nn.Module) -> None:
    """Looks for copies of weights that vLLM computes with instead of the parameters, in modules and in what they hold (attention backends).

    FlashInfer's attention keeps attention sinks in float32, for one; they would stay those of the first model. A copy is found by its values, in
    whatever order and precision, unless all are equal.

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
                    f"vLLM computes with a copy of parameter {name!r} ({place}), which would stay as it is when the parameter is replaced; choose another "
                    "engine.options.attention_backend, or engine.kind: transformers"
                )


def _held_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are no parameters or buffers: attributes of modules, and of objects that are such attributes, or theirs (a composed attention backend)."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute, held in vars(module).items():
            yield from _tensors_in(held, f"{name}.{attribute}", _MOST_NESTED, seen)


def _tensors_in(held: object, place: str, depth: int, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    attributes = getattr(held, "__dict__", None)
    if isinstance(held, torch.Tensor):
        yield place, held
    elif depth and id(held) not in seen and isinstance(attributes, dict) and not isinstance(held, _NO_HOLDERS):
        seen.add(id(held))  # all layers hold the configuration
        for attribute, inner in list(attributes.items()):
            yield from _tensors_in(inner, f"{place}.{attribute}", depth - 1, seen)


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same values, in whatever order, and not all of them equal."""
    if one.device != other.device:
        return False
    low = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    first, second = (value.reshape(-1).to(low).sort().values for value in (one, other))
    return bool(first[0] != first[-1]) and torch.equal(first, second)


def _sample(value: torch.Tensor) -> torch.Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, flat.numel() // _PROBE_ELEMENTS)]
