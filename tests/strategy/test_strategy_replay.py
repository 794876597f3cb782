"""Shared bookkeeping: replay detects and reports what cannot be reproduced."""

import json

import numpy as np
import pytest

from evomerge.core import Candidate, Direction, Evaluation, JournalError, Objective, Split, Status
from evomerge.strategy import make_strategy
from evomerge.testing.strategy_suite import Driver, StrategyCase

CASE = StrategyCase("random")


def saved_state():
    return json.loads(json.dumps(Driver(CASE, CASE.make()).run(10).strategy.state_dict()))


def test_proposal_that_differs_from_the_record_is_an_error():
    state = saved_state()
    state["log"][0]["ask"][1] = "0" * 16
    with pytest.raises(JournalError, match=r"c000002.*versions"):
        CASE.make().load_state_dict(state)


def test_result_of_an_unknown_candidate_is_an_error():
    state = saved_state()
    next(record for record in state["log"] if "tell" in record)["tell"][0][0] = "c000099"
    with pytest.raises(JournalError, match="damaged"):
        CASE.make().load_state_dict(state)


@pytest.mark.parametrize("key", ["strategy", "dimension", "objectives", "seed", "options", "format"])
def test_state_of_another_search_is_an_error(key):
    with pytest.raises(JournalError, match=key):
        CASE.make().load_state_dict({**saved_state(), key: "other"})


def test_state_with_other_objective_weights_is_an_error():
    def made(*weights):
        goals = [Objective(name, weight=weight) for name, weight in zip("ab", weights, strict=True)]
        return make_strategy("cma_es", dimension=2, objectives=goals, seed=1)

    state = made(1.0, 3.0).state_dict()
    made(1.0, 3.0).load_state_dict(state)
    with pytest.raises(JournalError, match=r"objectives is .* 3\.0.*, expected .* 2\.0"):
        made(1.0, 2.0).load_state_dict(state)


def test_saving_does_not_freeze_the_strategy():
    driver = Driver(CASE, CASE.make()).run(3)
    state = driver.strategy.state_dict()
    size = len(state["log"])
    driver.run(3)
    assert len(state["log"]) == size


LEARNERS = [
    StrategyCase("cma_es", n_objectives=1),
    StrategyCase("cma_es", n_objectives=1, options={"surrogate": "none"}),
    StrategyCase("catcma", n_objectives=1),
    StrategyCase("optuna", n_objectives=1),
]


def distance_of_what_comes_next(case, *, adopting=True):
    """Median distance to the target of 10 proposals, after replaying the record of another seed."""
    driver = Driver(case, case.make()).run(100)
    strategy = case.make(seed=8)
    if not adopting:
        strategy._adopt = lambda recorded, proposed: None
    for event in driver.history:
        strategy.repeat(event) if isinstance(event, Candidate) else strategy.tell([event])
    return np.median([-case.evaluate(candidate).scores["f0"] for candidate in strategy.ask(10)])


@pytest.mark.parametrize("case", LEARNERS, ids=str)
def test_recorded_proposals_are_learned_from(case):
    assert distance_of_what_comes_next(case) < 0.5 * distance_of_what_comes_next(case, adopting=False)


@pytest.mark.parametrize("name", ["cma_es", "map", "catcma", "nsga2", "m2n2"])
def test_loss_whose_square_overflows_is_treated_as_missing(name):
    """The perplexity of a ruined model; differences of such losses are infinite, and the search used to end with an internal error."""
    options = {"on": "recipes"} if name == "m2n2" else {}
    goal = Objective("ppl", Direction.MINIMIZE)
    strategy = make_strategy(name, dimension=3, objectives=[goal], seed=0, **options)
    generator = np.random.default_rng(3)
    for _ in range(40):
        (candidate,) = strategy.ask(1)
        ruined = generator.random() < 0.3
        ppl = 5e307 * (1.0 + candidate.point[0]) if ruined else 5.0 + candidate.point[0]
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores={"ppl": ppl})])
    assert strategy.recommend().point[0] < 1.0
