"""Fixtures for tests of several packages, and how the tests are spread over processes (`pytest -n 2 --dist loadgroup`)."""

from pathlib import Path

import pytest

from evomerge.zoo import build_zoo

REPOSITORY = Path(__file__).resolve().parent.parent

SHARED_BY_FOLDER = ("engine", "evaluation")
"""folders of tests whose files share engines that take seconds to start"""

LONGEST = ("e2e", "engine", "cli", "search", "zoo", "evaluation", "cluster")
"""folders that are started first, so that no process ends with a long file"""


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of the demo models: `zoo/` in the repository, built (minutes) where it is missing or outdated."""
    return build_zoo(REPOSITORY / "zoo").folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file (or folder) that shares costly fixtures in one process, and puts the longest first."""

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(REPOSITORY / "tests").parts[0]

    for item in items:
        group = folder(item) if folder(item) in SHARED_BY_FOLDER else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: LONGEST.index(folder(item)) if folder(item) in LONGEST else len(LONGEST))
