"""Every change that evomerge makes to third-party engine code: why, where upstream, which versions, and when it is in force.

All of them are for vLLM. Each is a context manager or a function that is in force only while an engine needs it, checks that
the code it replaces is the code it was written against, and has a test (tests/engine/test_patches.py).
"""

import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from evomerge.core import EngineError
from evomerge.engine.environment import SUPPORTED_VLLM

if TYPE_CHECKING:
    from vllm import LLM


def _replaced(module: ModuleType, name: str, parameters: tuple[str, ...]) -> Callable[..., object]:
    """The function `module.name`, after checking that it is there and takes `parameters`.

    Raises:
        EngineError: upstream has changed it.
    """
    import vllm

    function: Callable[..., object] | None = getattr(module, name, None)
    if not callable(function) or tuple(inspect.signature(function).parameters) != parameters:
        raise EngineError(
            f"vLLM {vllm.__version__}: {module.__name__}.{name}({', '.join(parameters)}) is not there any more; evomerge's "
            f"patches are written for vLLM {' and '.join(SUPPORTED_VLLM)}. Install one of these versions"
        )
    return function


@contextmanager
def writable_cpu_linears() -> Iterator[None]:
    """While an engine loads on a CPU: keep linear weights as plain parameters instead of packing them.

    Why: vLLM packs every linear weight into a oneDNN (or AMX, or zentorch) handler after loading and empties the parameter;
    the output layer keeps a dead copy. Later writes to the parameters are then ignored without an error, so every candidate
    would be scored with the first candidate's weights.
    Upstream: vllm/model_executor/layers/utils.py, `dispatch_cpu_unquantized_gemm`, called by the
    `process_weights_after_loading` of `UnquantizedLinearMethod` and `UnquantizedEmbeddingMethod`; no option turns it off.
    Cost: none measured below 10M parameters; 1.3 to 1.5 times the CPU time at 102M in float32, none in bfloat16.
    """
    import vllm.model_executor.layers.utils as upstream

    original = _replaced(upstream, "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight"))

    def keep_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        setattr(layer, "cpu_linear", torch.nn.functional.linear)  # noqa: B010 (modules type their attributes)

    upstream.dispatch_cpu_unquantized_gemm = keep_weight
    try:
        yield
    finally:
        upstream.dispatch_cpu_unquantized_gemm = original


def check_writable_cpu_linears(model: torch.nn.Module) -> None:
    """Checks that `writable_cpu_linears` reached every layer of a loaded model.

    Raises:
        EngineError: a layer computes with something else than its live parameter.
    """
    for name, module in model.named_modules():
        # On accelerators no layer has this attribute.
        if getattr(module, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear:
            raise EngineError(
                f"vLLM layer {name!r} has packed its weight, so it cannot be replaced in place; "
                "evomerge's patch for vLLM's CPU build did not reach it"
            )


def leave_processes_unbound() -> None:
    """Before a tensor-parallel engine starts on a CPU: let its processes run on any core, unless the user says otherwise.

    Why: vLLM wants a NUMA node for each ("Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers"), which few
    machines have.
    Upstream: vllm/utils/ompmultiprocessing.py.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def passing_sockets() -> Iterator[None]:
    """While an engine of several processes starts: keep the files of the sockets by which they meet in a folder that is removed afterwards.

    Why: vLLM leaves them in the temporary folder, eight of an engine of two processes, also after an orderly end. Once its processes are
    connected nobody looks for the files. It remembers its variables from the first engine of the process on, so that has to be forgotten.
    Upstream: vllm/distributed/device_communicators/shm_broadcast.py, `MessageQueue`; vllm/envs.py (`disable_envs_cache`).
    """
    import vllm.envs as upstream

    name = "VLLM_RPC_BASE_PATH"
    given = os.environ.get(name)
    with TemporaryDirectory(prefix="evomerge-", dir=given) as folder:
        upstream.disable_envs_cache()
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if given is not None:
                os.environ[name] = given


@contextmanager
def thread_setter_kept() -> Iterator[None]:
    """While an engine starts on a CPU: give `torch.set_num_threads` back afterwards.

    Why: vLLM replaces it by a function that only logs, for the whole process, so that other code in the worker (the merger)
    could never choose its threads again.
    Upstream: vllm/v1/worker/cpu_worker.py, `CPUWorker.init_device`.
    """
    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original


@contextmanager
def tolerant_kernel_scan() -> Iterator[None]:
    """While an engine starts on a CPU: let vLLM's search for Triton kernels pass over objects it cannot read.

    Why: vLLM looks at every attribute of every loaded module and calls `vars(value).get(...)`, which fails on objects whose
    `__dict__` is no dict. numba (through llvmlite's foreign functions) has some, so an engine could not start in a process that has
    merged before.
    Upstream: vllm/triton_utils/dispatcher.py, `_rebind_kernels`, called by the CPU platform's `register_triton_kernel_overrides`.
    """
    import vllm.triton_utils.dispatcher as upstream

    _replaced(upstream, "_rebind_kernels", ("overrides",))

    def readable_vars(value: object) -> Mapping[str, object]:
        attributes = vars(value)
        return attributes if isinstance(attributes, Mapping) else {}

    upstream.vars = readable_vars
    try:
        yield
    finally:
        del upstream.vars


def leave_log_probabilities_without_text(llm: "LLM") -> None:
    """After requests are handed to an engine, before they run: leave the tokens whose log-probabilities they ask for without text.

    Why: vLLM looks up the text of each, one by one, for every token that is generated. Nobody reads it, and `detokenize=False`, which leaves it
    out, would leave out the answer's text as well.
    Upstream: vllm/v1/engine/logprobs.py, `LogprobsProcessor`, whose `tokenizer` is None where no text is wanted.
    """
    for state in llm.llm_engine.output_processor.request_states.values():
        if state.logprobs_processor is not None:
            state.logprobs_processor.tokenizer = None


class DistributedState:
    """Keeps vLLM's process-wide distributed state alive until the last engine of the process is closed.

    Why: shutting one engine down destroys the process groups that all engines of the process share, after which every other
    one dies at its next step (`pipeline model parallel group is not initialized`).
    Upstream: vllm/v1/engine/core.py, `EngineCore.shutdown`, which calls `cleanup_dist_env_and_memory`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_engines = 0

    def acquire(self) -> None:
        """Counts one more engine."""
        with self._lock:
            self._n_engines += 1

    def release(self, shutdown: Callable[[], object]) -> None:
        """Calls `shutdown` for one engine; the shared state is destroyed only if it was the last.

        Raises:
            EngineError: vLLM's shutdown is not the one this was written for.
        """
        import vllm.v1.engine.core as upstream

        original = _replaced(upstream, "cleanup_dist_env_and_memory", ("shutdown_ray",))
        with self._lock:
            self._n_engines -= 1
            if self._n_engines > 0:
                upstream.cleanup_dist_env_and_memory = lambda shutdown_ray=False: None
            try:
                shutdown()
            finally:
                upstream.cleanup_dist_env_and_memory = original


DISTRIBUTED_STATE = DistributedState()
"""The process's one counter of running engines."""
