"""Fixtures for tests of several packages, and how the tests are spread over processes (`pytest -n 2 --dist loadgroup`)."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from evomerge.engine.segments import mapped_segments
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


@pytest.fixture
def left_in_shared_memory() -> Callable[[], set[str]]:
    """A function: what has appeared in `/dev/shm` since the test began and nobody alive uses, after a while for it to go."""
    folder = "/dev/shm"  # noqa: S108  (looked at, not written to)
    before = set(os.listdir(folder))

    def left() -> set[str]:
        deadline = time.monotonic() + 30
        while True:
            new = set(os.listdir(folder)) - before
            new -= mapped_segments(*psutil.pids())
            if not new or time.monotonic() > deadline:
                return new
            time.sleep(0.2)

    return left


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file (or folder) that shares costly fixtures in one process, and orders the folders."""

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(REPOSITORY / "tests").parts[0]

    for item in items:
        group = folder(item) if folder(item) in SHARED_BY_FOLDER else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(folder(item)) if folder(item) in FIRST else len(FIRST))
