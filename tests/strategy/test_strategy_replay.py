"""The shared bookkeeping: replay finds what cannot be reproduced, and says so."""

import json

import pytest

from evomerge.core import JournalError
from evomerge.testing.strategy_suite import Driver, StrategyCase

CASE = StrategyCase("random")


def saved_state():
    return json.loads(json.dumps(Driver(CASE, CASE.make()).run(10).strategy.state_dict()))


def test_another_proposal_than_recorded_is_an_error():
    state = saved_state()
    state["log"][0]["ask"][1] = "0" * 16
    with pytest.raises(JournalError, match=r"c000002.*versions"):
        CASE.make().load_state_dict(state)


def test_a_result_of_nobody_is_an_error():
    state = saved_state()
    next(record for record in state["log"] if "tell" in record)["tell"][0][0] = "c000099"
    with pytest.raises(JournalError, match="damaged"):
        CASE.make().load_state_dict(state)


@pytest.mark.parametrize("key", ["strategy", "dimension", "objectives", "seed", "options", "format"])
def test_a_state_of_something_else_is_an_error(key):
    with pytest.raises(JournalError, match=key):
        CASE.make().load_state_dict({**saved_state(), key: "other"})


def test_saving_does_not_freeze_the_strategy():
    driver = Driver(CASE, CASE.make()).run(3)
    state = driver.strategy.state_dict()
    size = len(state["log"])
    driver.run(3)
    assert len(state["log"]) == size
