"""The worker extension (`worker_extension_cls`) with which each of vLLM's worker processes writes its own shard of the weights.

vLLM imports this module in a worker process before it loads the model. On a CPU that is the only chance to disable the packing of
linear weights in that process, so the import does it; import this module nowhere else.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomerge.core import EvomergeError
from evomerge.engine.base import RemoteWrite
from evomerge.engine.checkpoint import CheckpointFolder
from evomerge.engine.environment import vllm_targets_cpu
from evomerge.engine.patches import writable_cpu_linears
from evomerge.engine.vllm_weights import ModelWeights

_PATCH = writable_cpu_linears()
if vllm_targets_cpu():
    _PATCH.__enter__()  # for the life of this process, which serves one engine


class Shard:
    """Methods for `collective_rpc`. Each returns JSON; on failure `{"error": ..., "broken": ...}`, where broken means that the error came from a library."""

    get_model: Callable[[], Any]
    """provided by vLLM's worker"""
    _evomerge_weights: ModelWeights

    def evomerge_discover(self, folder: str) -> str:
        """Find the places of the checkpoint's tensors in this shard; return the number of elements of each."""

        def discover() -> dict[str, Any]:
            with CheckpointFolder(Path(folder)) as checkpoint:
                self._evomerge_weights = ModelWeights(self.get_model(), checkpoint, whole=False)
            return {"elements": self._evomerge_weights.n_elements()}

        return _answer(discover)

    def evomerge_write(self, function: str, settings: str) -> str:
        """Apply a `RemoteWrite` to this shard."""

        def write() -> dict[str, Any]:
            self._evomerge_weights.write(RemoteWrite(function, json.loads(settings)))
            return {}

        return _answer(write)

    def evomerge_clear_caches(self) -> str:
        """Zero this process's keys and values."""

        def clear() -> dict[str, Any]:
            self._evomerge_weights.clear_caches()
            return {}

        return _answer(clear)


def _answer(work: Callable[[], dict[str, Any]]) -> str:
    try:
        return json.dumps(work())
    except EvomergeError as error:
        return json.dumps({"error": str(error), "broken": False})
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}", "broken": True})
