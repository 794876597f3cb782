"""Benchmarks run rarely; what they import from evomerge must still exist."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=[path.stem for path in BENCHMARKS])
def test_everything_a_benchmark_imports_exists(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        module = node.module or ""
        if not module.startswith("evomerge") or (
            module.startswith("evomerge.weights.triton") and not find_spec("triton")
        ):
            continue
        home = import_module(module)
        for name in node.names:
            assert hasattr(home, name.name) or find_spec(f"{module}.{name.name}"), f"{module} has no {name.name}"
