"""The names of vLLM's options, read from its source: importing vLLM takes seconds, too long where a configuration is only checked."""

import ast
import importlib.util
from pathlib import Path

_OF_LLM = {"chat_template"}
"""arguments of `vllm.LLM` that it does not hand on to `EngineArgs`"""


def vllm_option_names() -> frozenset[str]:
    """What `vllm.LLM` takes besides the model; empty where vLLM is not installed, or its source is laid out otherwise."""
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
