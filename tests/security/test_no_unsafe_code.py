"""Our own source contains nothing that can run code that came with data."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "evomerge"
FILES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "code",
    "pty",
}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "torch.jit.load", "torch.hub.load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "yaml.full_load", "yaml.full_load_all", "os.system", "os.popen", "pd.read_pickle", "ray.cloudpickle.loads",
}  # fmt: skip
STRICT_YAML = PACKAGE / "core" / "safe_yaml.py"
"""the only place that reads YAML, with a loader that supports no tags"""


def name_of(node: ast.expr) -> str:
    """`a.b.c` as text; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = name_of(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def complaints(source: str, path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{where} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(f"{where} calls {name}")
            if name in ("yaml.load", "yaml.load_all") and path != STRICT_YAML:
                found.append(f"{where} reads YAML without the strict loader")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if value is True and keyword.arg in ("trust_remote_code", "allow_pickle", "shell"):
                    found.append(f"{where} passes {keyword.arg}=True")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_can_run_code_from_data(path: Path) -> None:
    assert complaints(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')", "import os\nos.system('x')",
        "import yaml\nyaml.load('x', Loader=yaml.Loader)", "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import subprocess\nsubprocess.run('x', shell=True)", "f(trust_remote_code=True)",
    ],
)  # fmt: skip
def test_unsafe_code_is_detected(source: str) -> None:
    assert complaints(source, PACKAGE / "x.py")


def test_the_yaml_loader_is_safe() -> None:
    import yaml

    from evomerge.core import safe_yaml

    assert issubclass(safe_yaml._StrictLoader, yaml.SafeLoader)
    assert not issubclass(safe_yaml._StrictLoader, yaml.FullLoader | yaml.UnsafeLoader)
