"""All patches to third-party engine code: the reason, the upstream location, the versions, and when each is active.

All of them are for vLLM. Each is a context manager or function that is active only while an engine needs it, checks that
the code it replaces is the code it was written for, and has a test (tests/engine/test_patches.py).
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
    """The function `module.name`, after checking that it exists and takes `parameters`.

    Raises:
        EngineError: upstream has changed it.
    """
    import vllm

    function: Callable[..., object] | None = getattr(module, name, None)
    if not callable(function) or tuple(inspect.signature(function).parameters) != parameters:
        raise EngineError(
            f"vLLM {vllm.__version__}: {module.__name__}.{name}({', '.join(parameters)}) no longer exists; evomerge's "
            f"patches are written for vLLM {' and '.join(SUPPORTED_VLLM)}. Install one of these versions"
        )
    return function


@contextmanager
def writable_cpu_linears() -> Iterator[None]:
    """Keep linear weights as plain parameters instead of packing them while an engine loads on a CPU.

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
    """Check that `writable_cpu_linears` reached every layer of a loaded model.

    Raises:
        EngineError: a layer does not compute with its live parameter.
    """
    for name, module in model.named_modules():
        # On accelerators no layer has this attribute.
        if getattr(module, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear:
            raise EngineError(
                f"vLLM layer {name!r} has packed its weight, so it cannot be replaced in place; "
                "evomerge's patch for vLLM's CPU build did not reach it"
            )


def leave_processes_unbound() -> None:
    """Let the processes of a tensor-parallel CPU engine run on any core, unless the user has set a binding. Call it before the engine starts.

    Why: vLLM requires a NUMA node for each ("Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers"), which few
    machines have.
    Upstream: vllm/utils/ompmultiprocessing.py.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def passing_sockets() -> Iterator[None]:
    """Put the socket files of a multi-process engine into a folder that is removed once the engine has started.

    Why: vLLM leaves them in the temporary folder (eight for an engine of two processes), even after an orderly shutdown. Once its processes
    are connected, the files are no longer needed. vLLM caches its variables from the first engine of the process on, so that cache is disabled.
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
    """Restore `torch.set_num_threads` after an engine has started on a CPU.

    Why: vLLM replaces it, for the whole process, with a function that only logs, so other code in the worker (the merger)
    could no longer set its number of threads.
    Upstream: vllm/v1/worker/cpu_worker.py, `CPUWorker.init_device`.
    """
    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original


@contextmanager
def tolerant_kernel_scan() -> Iterator[None]:
    """Let vLLM's search for Triton kernels skip objects it cannot read while an engine starts on a CPU.

    Why: vLLM looks at every attribute of every loaded module and calls `vars(value).get(...)`, which fails on objects whose
    `__dict__` is not a dict. numba has some (llvmlite's foreign functions), so an engine could not start in a process that has
    already merged.
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
    """Skip decoding the tokens whose log-probabilities are requested. Call it after the requests are queued and before they run.

    Why: vLLM decodes each of these tokens one by one for every generated token. This text is never used, and `detokenize=False` would
    drop the text of the answer as well.
    Upstream: vllm/v1/engine/logprobs.py, `LogprobsProcessor`, whose `tokenizer` is None if no text is wanted.
    """
    for state in llm.llm_engine.output_processor.request_states.values():
        if state.logprobs_processor is not None:
            state.logprobs_processor.tokenizer = None


class DistributedState:
    """Keeps vLLM's process-wide distributed state alive until the last engine of the process is closed.

    Why: shutting down one engine destroys the process groups that all engines of the process share, and every other engine
    then dies at its next step (`pipeline model parallel group is not initialized`).
    Upstream: vllm/v1/engine/core.py, `EngineCore.shutdown`, which calls `cleanup_dist_env_and_memory`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_engines = 0

    def acquire(self) -> None:
        """Register one more engine."""
        with self._lock:
            self._n_engines += 1

    def release(self, shutdown: Callable[[], object]) -> None:
        """Call `shutdown` for one engine; the shared state is destroyed only if this was the last engine.

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
"""The process-wide counter of running engines."""
