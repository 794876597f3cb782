"""Fixtures for tests of several packages, and how the tests are spread over processes (`pytest -n 2 --dist loadgroup`)."""

from pathlib import Path

import pytest

from evomerge.zoo import build_zoo

REPOSITORY = Path(__file__).resolve().parent.parent

SHARED_BY_FOLDER = ("engine", "evaluation")
"""folders of tests whose files share engines that take seconds to start"""

FIRST = ("cluster", "e2e", "engine", "docs", "cli", "search", "zoo", "evaluation")
"""Folders in the order of their start: Ray before vLLM imports it with settings that are not ours, then the longest."""


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of the demo models: `zoo/` in the repository, built (minutes) where it is missing or outdated."""
    return build_zoo(REPOSITORY / "zoo").folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file (or folder) that shares costly fixtures in one process, and orders the folders."""

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(REPOSITORY / "tests").parts[0]

    for item in items:
        group = folder(item) if folder(item) in SHARED_BY_FOLDER else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(folder(item)) if folder(item) in FIRST else len(FIRST))
