"""Seeded trajectories stay the same as long as the libraries do; a strategy without a recorded trajectory fails the coverage test."""

import numpy as np
import pytest
from strategy_golden import other_versions, read_golden, rounded_alike

from evomerge.testing.strategy_suite import strategy_cases

CASES = strategy_cases()


@pytest.fixture(scope="module")
def proposals():
    return rounded_alike()


def test_every_case_has_a_trajectory():
    assert sorted(read_golden()) == sorted(map(str, CASES)), "run: python tests/strategy/strategy_golden.py --write"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory_is_unchanged(case, proposals):
    for found, recorded in zip(proposals[str(case)], read_golden()[str(case)], strict=True):
        if other_versions() and not np.allclose(found, recorded, atol=2e-6):
            pytest.xfail(f"recorded with other versions: {other_versions()}")
        np.testing.assert_allclose(found, recorded, atol=2e-6)
