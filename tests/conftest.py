"""Fixtures for tests of several packages, and how the tests are spread over processes (`pytest -n 2 --no-loadscope-reorder`)."""

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

# A timing is no test: on a busy machine an example may take any time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

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


@pytest.fixture(scope="session")
def mergekit() -> Callable[..., None]:
    """`mergekit(*arguments)` runs the Python of mergekit's own environment; where that is not installed the test is skipped."""
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
    """Skips the test where this machine cannot isolate a process."""
    try:
        check_sandbox()
    except EvaluationError as reason:
        pytest.skip(str(reason))


def _folder(path: str) -> str:
    """The folder inside `tests` of a file, given as a path or the start of a test's id."""
    return (REPOSITORY / path).relative_to(REPOSITORY / "tests").parts[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps a file (or folder) that shares costly fixtures in one process, whatever `--dist` says.

    `--dist loadgroup` would do it by marks, but xdist 3.8 does not see marks under pytest 9.2, and every fixture is made twice.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _folder(file) if _folder(file) in SHARED_BY_FOLDER else file

    return ByFixtures(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the folders."""
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(_folder(str(item.path)), len(FIRST)))
