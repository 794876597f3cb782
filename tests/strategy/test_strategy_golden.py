"""Seeded trajectories stay what they were; a strategy without one fails the coverage test."""

import numpy as np
import pytest
from strategy_golden import read_golden, rounded_alike

from evomerge.testing.strategy_suite import strategy_cases

CASES = strategy_cases()


@pytest.fixture(scope="module")
def proposals():
    return rounded_alike()


def test_every_case_has_a_trajectory():
    assert sorted(read_golden()) == sorted(map(str, CASES)), "run: python tests/strategy/strategy_golden.py --write"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory(case, proposals):
    for found, recorded in zip(proposals[str(case)], read_golden()[str(case)], strict=True):
        np.testing.assert_allclose(found, recorded, atol=2e-6)
