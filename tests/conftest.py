"""Fixtures used by the tests of several packages, and how tests are distributed over processes (`pytest -n 2 --no-loadscope-reorder`)."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

from evomerge.core import EvaluationError
from evomerge.engine.segments import mapped_segments
from evomerge.evaluation.sandbox import check_sandbox
from evomerge.zoo import build_zoo

# No deadline: on a busy machine an example may take any amount of time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

REPOSITORY = Path(__file__).resolve().parent.parent

SHARED_BY_FOLDER = ("engine", "evaluation")
"""test folders whose files share engines that take seconds to start"""

FIRST = ("cluster", "e2e", "engine", "docs", "cli", "search", "zoo", "evaluation")
"""Folders in the order in which they start: Ray's tests before vLLM imports Ray with settings that are not ours, then the longest."""


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of the demo models: `zoo/` in the repository, built (which takes minutes) if missing or outdated."""
    return build_zoo(REPOSITORY / "zoo").folder


@pytest.fixture
def left_in_shared_memory() -> Callable[[], set[str]]:
    """A function that returns what has appeared in `/dev/shm` since the test began and no live process uses, after allowing it some time to go."""
    folder = "/dev/shm"  # noqa: S108  (only listed, never written to)
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


@pytest.fixture(scope="session")
def mergekit() -> Callable[..., None]:
    """`mergekit(*arguments)` runs Python in mergekit's own environment; if that is not installed, the test is skipped."""
    python = Path(os.environ.get("MERGEKIT_PYTHON", REPOSITORY / ".venv-mergekit" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"mergekit's environment is not installed ({python}): make .venv-mergekit/.installed")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> None:
        command = [str(python), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skips the test if this machine cannot isolate a process."""
    try:
        check_sandbox()
    except EvaluationError as reason:
        pytest.skip(str(reason))


def _folder(path: str) -> str:
    """The folder inside `tests` that contains a file, given as a path or as the start of a test id."""
    return (REPOSITORY / path).relative_to(REPOSITORY / "tests").parts[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps a file (or folder) that shares costly fixtures in one process, whatever `--dist` says.

    `--dist loadgroup` could do this with marks, but xdist 3.8 does not see marks under pytest 9.2, so every fixture would be created twice.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _folder(file) if _folder(file) in SHARED_BY_FOLDER else file

    return ByFixtures(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts tests by folder."""
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(_folder(str(item.path)), len(FIRST)))
