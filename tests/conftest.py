"""Fixtures for tests of several packages."""

from pathlib import Path

import pytest

from evomerge.zoo import build_zoo

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of the demo models: `zoo/` in the repository, built (minutes) where it is missing or outdated."""
    return build_zoo(REPOSITORY / "zoo").folder
