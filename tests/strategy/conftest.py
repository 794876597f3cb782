"""Skips the tests of a strategy whose library, an optional extra, is not installed."""

import pytest

from evomerge.testing.strategy_suite import lacking_library


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = parameters["case"].name if "case" in parameters else parameters.get("name")
    library = lacking_library(name)
    if library is not None:
        pytest.skip(f"{library} is not installed (the extra {name})")
