"""No folder of tests is left out of the whole suite: by default pytest does not look into folders with names such as `build`."""

from fnmatch import fnmatch
from pathlib import Path

import pytest


def test_pytest_looks_into_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    skipped = pytestconfig.getini("norecursedirs")
    folders = {file.parent for file in Path(__file__).parent.rglob("test_*.py")}
    assert len(folders) > 15
    assert [folder.name for folder in folders for pattern in skipped if fnmatch(folder.name, pattern)] == []
