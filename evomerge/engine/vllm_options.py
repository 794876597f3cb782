"""The options of vLLM, and those that evomerge refuses. Does not import vLLM, which would take seconds: too long for checking a configuration."""

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from evomerge.core import Json

_OF_LLM = {"chat_template"}
"""arguments of `vllm.LLM` that it does not pass on to `EngineArgs`"""

_SPREAD = "distributes the model so that its weights cannot be replaced in place (use tensor_parallel or more workers instead)"
_OTHER_CACHE = "keeps cached prefixes after the weights that computed them have been replaced"
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
"""Options with which vLLM might silently compute with weights other than the candidate's -> (the only accepted value, what other values do)."""


def vllm_options_refused(options: Mapping[str, Json]) -> list[str]:
    """A message for each option that does not have its only accepted value."""
    return [
        f"{name}={options[name]!r} {why}; use {name}={only!r}"
        for name, (only, why) in _FIXED.items()
        if options.get(name, only) != only
    ]


def vllm_option_names() -> frozenset[str]:
    """The arguments of `vllm.LLM` besides the model, read from its source; empty if vLLM is not installed or its source has another structure."""
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
