"""Every class of bad input has a test: `test_<number>_...` in the files for its kind, or one elsewhere."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

TESTS = Path(__file__).parents[1]


def check_classes(numbers: Iterable[int], files: Iterable[Path], elsewhere: Mapping[int, str]) -> None:
    """Checks that the tests in `files`, together with those that `elsewhere` names and that must exist, cover exactly these classes."""
    here = [name.split("_")[1] for file in files for name in _tests_in(file)]
    assert {int(number) for number in here if number.isdigit()} | set(elsewhere) == set(numbers)
    for place in elsewhere.values():
        file, _, name = place.partition("::")
        assert name in _tests_in(TESTS / file), place


def _tests_in(path: Path) -> list[str]:
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return [node.name for node in functions if node.name.startswith("test_")]
