"""Starts vLLM, and refuses models that it cannot serve or would silently serve wrongly."""

import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.core import EngineError
from evomerge.engine.environment import SUPPORTED_VLLM, supports_vllm, vllm_targets_cpu
from evomerge.engine.gpu_memory import check_gpu
from evomerge.engine.patches import (
    leave_processes_unbound,
    passing_sockets,
    thread_setter_kept,
    tolerant_kernel_scan,
    writable_cpu_linears,
)

if TYPE_CHECKING:
    from vllm import LLM

VLLM_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    LookupError,
    AttributeError,
    NotImplementedError,
    AssertionError,
)
"""What vLLM raises for a model, an option, a machine or a batch it cannot serve (its own errors are subclasses of these)."""
_KEY_VALUE_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
"""Config keys in which vLLM looks for the number of key-value heads (vllm/transformers_utils/model_arch_config_convertor.py)."""


def start_vllm(model: Path, arguments: Mapping[str, Any]) -> "LLM":
    """A running vLLM.

    Args:
        model: Hugging Face folder.
        arguments: of `vllm.LLM`.

    Raises:
        EngineError: vLLM is missing, its version is not supported, it lacks the hardware it is built for, or it cannot serve the model.
    """
    with ExitStack() as stack:
        # Deprecation warnings between torch, vLLM and its dependencies, on which a user cannot act.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        try:
            from vllm import LLM, __version__
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}); install evomerge with the extra `cpu` or `gpu`, or use the transformers engine"
            ) from error
        if not supports_vllm(__version__):
            raise EngineError(
                f"vLLM {__version__}: replacing weights in place is supported in vLLM {' and '.join(SUPPORTED_VLLM)} only; install one of these, "
                "or set engine.kind: transformers"
            )
        check_gpu()
        is_sharded = arguments.get("tensor_parallel_size", 1) != 1
        if is_sharded:
            stack.enter_context(passing_sockets())
        if vllm_targets_cpu():
            stack.enter_context(writable_cpu_linears())
            stack.enter_context(thread_setter_kept())
            stack.enter_context(tolerant_kernel_scan())
            if is_sharded:
                leave_processes_unbound()
        try:
            return LLM(model=str(model), **arguments)
        except VLLM_ERRORS as error:
            raise EngineError(f"vLLM cannot serve {model}: {error}{_missing_package(str(error))}") from error


def _missing_package(error: str) -> str:
    """A hint for vLLM's failure to import its code for a model: for most image-text models, torchvision is missing."""
    if "failed to be inspected" not in error or importlib.util.find_spec("torchvision") is not None:
        return ""
    return (
        "\nvLLM's code for most image-text models imports torchvision, which is not installed (the CPU build leaves it out); "
        "engine.kind: transformers serves their language model without it"
    )


def check_served_as_meant(llm: "LLM") -> None:
    """Raise EngineError if the weights cannot be replaced, or if vLLM would compute something different from the model."""
    _check_unquantised(llm)
    _check_key_value_heads(llm)
    _check_latent_attention(llm)


def _check_unquantised(llm: "LLM") -> None:
    """Raise EngineError if the model's weights are quantised."""
    if llm.model_config.quantization is not None:
        raise EngineError(
            f"vLLM engine: the model is quantised ({llm.model_config.quantization}); such weights cannot be replaced in place"
        )


def _check_key_value_heads(llm: "LLM") -> None:
    """Check the number of key-value heads. vLLM runs models it has no code for with transformers' code, but takes this number from any of `_KEY_VALUE_HEADS`.

    Raises:
        EngineError: config.json has such a key that the model itself does not read: vLLM would silently compute a different attention.
    """
    if not llm.model_config.using_transformers_backend():
        return
    config = llm.model_config.hf_text_config
    known = {*inspect.signature(type(config).__init__).parameters, *type(config).attribute_map}
    own = type(config).from_dict({key: value for key, value in config.to_dict().items() if key in known})
    heads = llm.model_config.model_arch_config.total_num_attention_heads
    for name in _KEY_VALUE_HEADS:
        found = getattr(config, name, None)
        if name not in known and found not in (getattr(own, name, heads), None):
            raise EngineError(
                f"vLLM engine: config.json has {name} = {found}, which a {config.model_type} model ignores but vLLM would use; "
                "remove it from config.json, or use engine.kind: transformers"
            )


def _check_latent_attention(llm: "LLM") -> None:
    """Refuse latent attention on CPUs: vLLM's rotary kernel (`RotaryEmbedding.forward_cpu` in 0.32 and 0.33) rotates queries of shape (tokens, heads, size) wrongly.

    Raises:
        EngineError: the model passes it such queries, as models with latent attention do.
    """
    if vllm_targets_cpu() and llm.model_config.is_deepseek_mla:
        raise EngineError(
            "vLLM engine: on a CPU, vLLM silently computes latent attention (DeepSeek) with wrong positions; use engine.kind: transformers"
        )
