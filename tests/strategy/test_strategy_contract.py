"""Every registered strategy fulfils the contract, and resumes bit for bit in a new process."""

import pytest

from evomerge.core import genome_to_json
from evomerge.testing.strategy_checks import STRATEGY_CHECKS
from evomerge.testing.strategy_suite import Driver, lacking_library, resume_in_new_process, strategy_cases

CASES = strategy_cases()


@pytest.mark.parametrize("check", STRATEGY_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case, check):
    check(case)


def test_strategies_resume_exactly_in_a_new_process():
    cases = [case for case in CASES if lacking_library(case.name) is None]
    jobs = []
    expected = []
    for case in cases:
        driver = Driver(case, case.make()).run(30)
        jobs.append((case, driver.saved()))
        driver.trace.clear()
        expected.append([[candidate.id, genome_to_json(candidate.genome)] for candidate in driver.run(20).trace])
    for case, answer, wanted in zip(cases, resume_in_new_process(jobs, 20), expected, strict=True):
        assert answer == wanted, str(case)
