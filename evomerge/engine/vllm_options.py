"""Which options vLLM has, and which of them an engine here cannot have. Without importing vLLM, which takes seconds, too long for a check of a configuration."""

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from evomerge.core import Json

_OF_LLM = {"chat_template"}
"""arguments of `vllm.LLM` that it does not hand on to `EngineArgs`"""

_SPREAD = "spreads the model in a way in which its weights cannot be replaced in place (tensor_parallel and more workers do not)"
_OTHER_CACHE = "keeps prefixes where they outlive the weights that they were computed with"
_FIXED: Mapping[str, tuple[Json, str]] = {
    "pipeline_parallel_size": (1, _SPREAD),
    "data_parallel_size": (1, _SPREAD),
    "prefill_context_parallel_size": (1, _SPREAD),
    "decode_context_parallel_size": (1, _SPREAD),
    "enable_eplb": (False, "moves experts while the engine runs, away from where they are written"),
    "offload_group_size": (0, "lets layers share memory, into which vLLM copies weights of its own"),
    "kv_offloading_size": (None, _OTHER_CACHE),
    "kv_transfer_config": (None, _OTHER_CACHE),
}
"""Options with which vLLM may compute with other weights than the candidate's, without an error: what they must be, and what others do."""


def vllm_options_refused(options: Mapping[str, Json]) -> list[str]:
    """What is wrong with each option that has another value than the one it must have."""
    return [
        f"{name}={options[name]!r} {why}; use {name}={only!r}"
        for name, (only, why) in _FIXED.items()
        if options.get(name, only) != only
    ]


def vllm_option_names() -> frozenset[str]:
    """Read from its source: what `vllm.LLM` takes besides the model; empty where vLLM is not installed, or its source is laid out otherwise."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    try:
        source = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    classes = [node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"]
    fields = [node.target for found in classes for node in found.body if isinstance(node, ast.AnnAssign)]
    names = {field.id for field in fields if isinstance(field, ast.Name)}
    return frozenset((names | _OF_LLM) - {"model"}) if names else frozenset()
