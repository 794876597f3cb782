"""Conformance checks for strategies, for any test runner: every check takes a `StrategyCase` and asserts.

@pytest.mark.parametrize("check", STRATEGY_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", strategy_cases(), ids=str)
def test_contract(case, check):
    check(case)
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from evomerge.core import (
    Candidate,
    ConfigError,
    CrossoverGenome,
    Evaluation,
    EvaluationError,
    JournalError,
    SpaceError,
    Split,
    Status,
    VectorGenome,
    canonical_json,
    genome_from_json,
    genome_to_json,
)
from evomerge.strategy import Strategy
from evomerge.testing.strategy_suite import Driver, StrategyCase, restored


def check_bounds_and_ids(case: StrategyCase) -> None:
    """Proposals are points of [0, 1]^d, or crossovers of their parents, with unique ids in order; parents are known ids."""
    driver = Driver(case, case.make()).run(60)
    ids = [candidate.id for candidate in driver.trace]
    assert len(ids) == len(set(ids))
    assert ids == sorted(ids)
    for candidate in driver.trace:
        _check_inside(case, candidate)
        assert all(parent in ids and parent < candidate.id for parent in candidate.parents)


def _check_inside(case: StrategyCase, candidate: Candidate) -> None:
    genome = candidate.genome
    assert genome_from_json(json.loads(canonical_json(genome_to_json(genome)))) == genome
    if isinstance(genome, CrossoverGenome):
        assert genome.parents == candidate.parents
        values, expected = (genome.mix, *genome.splits), len(genome.splits) + 1
    else:
        values, expected = genome.values, case.dimension
    assert len(values) == expected
    assert all(isinstance(value, float) and 0.0 <= value <= 1.0 for value in values)


def check_determinism(case: StrategyCase) -> None:
    """The same seed and calls give the same proposals, another seed gives others, and global random state does not change."""
    first = Driver(case, case.make()).run(40).trace
    global_state = str(np.random.get_state(legacy=False))  # noqa: NPY002 - it must not change
    second = Driver(case, case.make()).run(40).trace
    assert str(np.random.get_state(legacy=False)) == global_state  # noqa: NPY002
    assert first == second
    assert first != Driver(case, case.make(seed=8)).run(40).trace


def check_ask_many_is_ask_one_often(case: StrategyCase) -> None:
    """`ask(n)` equals n times `ask(1)`; pending candidates need not be told before the next ask."""
    at_once = list(case.make().ask(6))
    strategy = case.make()
    one_by_one = [candidate for _ in range(6) for candidate in strategy.ask(1)]
    assert at_once
    assert at_once == one_by_one


def check_many_pending(case: StrategyCase) -> None:
    """Many more candidates than a population may be pending and then told without an ask in between, as at the end of a budget; resuming still works."""
    driver = Driver(case, case.make())
    driver.pending = list(driver.strategy.ask(60))
    for candidate in driver.pending[:-4]:
        driver.strategy.tell([case.evaluate(candidate)])
    driver.pending, driver.n_told = driver.pending[-4:], 56
    again = restored(case, driver.saved())
    assert driver.run(10).trace == again.run(10).trace


def check_empty_ask_changes_nothing(case: StrategyCase) -> None:
    """An empty answer leaves the state and all later proposals unchanged."""
    plain = Driver(case, case.make())
    nosy = Driver(case, case.make())
    for _ in range(30):
        nosy.strategy.ask(0)
        assert plain.run(1).trace == nosy.run(1).trace
    state = nosy.strategy.state_dict()
    assert not nosy.strategy.ask(0)
    assert canonical_json(state) == canonical_json(nosy.strategy.state_dict())
    waiting = case.make()
    for _ in range(200):
        state = waiting.state_dict()
        if not waiting.ask(1):
            assert canonical_json(state) == canonical_json(waiting.state_dict())
            return


def check_tell_refuses_strangers(case: StrategyCase) -> None:
    """Unknown, repeated and incomplete results raise a typed error, and nothing from the call is learned."""
    strategy = case.make()
    (first,) = strategy.ask(1)
    good = case.evaluate(first)
    bad = Evaluation("c999999", Split.SEARCH, Status.FAILED)
    empty = Evaluation(first.id, Split.SEARCH, Status.OK)
    for wrong in ([good, bad], [good, good], [empty]):
        state = canonical_json(strategy.state_dict())
        _assert_raises(EvaluationError, partial(strategy.tell, wrong))
        assert canonical_json(strategy.state_dict()) == state
    strategy.tell([good])
    _assert_raises(EvaluationError, lambda: strategy.tell([good]))
    _assert_raises(ConfigError, lambda: strategy.ask(-1))


def check_failures(case: StrategyCase) -> None:
    """If all candidates fail, proposals continue and `recommend` raises; NaN counts as failed."""
    strategy = case.make()
    _assert_raises(EvaluationError, strategy.recommend)
    for round_ in range(40):
        candidates = strategy.ask(3)
        status = Status.FAILED if round_ % 2 else Status.INFEASIBLE
        strategy.tell([case.evaluate(candidate, status) for candidate in reversed(candidates)])
    (candidate,) = strategy.ask(1)
    scores = dict.fromkeys((objective.name for objective in case.objectives()), float("nan"))
    strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)])
    _assert_raises(EvaluationError, strategy.recommend)
    Driver(case, strategy).run(30)
    assert strategy.recommend().id > candidate.id


def check_equal_scores(case: StrategyCase) -> None:
    """Proposals continue if every candidate has the same score, as on items that all or none of them solve."""
    strategy = case.make()
    goals = case.objectives()
    for _ in range(30):
        (candidate,) = strategy.ask(1)
        scores = {goal.name: 1.0 for goal in goals}
        items = {goal.name: np.ones(11, dtype=np.float32) for goal in goals}
        result = Evaluation(candidate.id, Split.SEARCH, Status.OK, scores, dict.fromkeys(scores, 0.0), items)
        strategy.tell([result])
    assert strategy.recommend().id <= candidate.id


def check_recommend(case: StrategyCase) -> None:
    """The recommended candidate was evaluated successfully, and with one objective no other is better."""
    driver = Driver(case, case.make()).run(50)
    told = [candidate for candidate in driver.trace if candidate not in driver.pending and int(candidate.id[1:]) % 7]
    choice = driver.strategy.recommend()
    assert choice in told
    if case.n_objectives == 1:
        best = max(case.evaluate(candidate).scores["f0"] for candidate in told)
        assert case.evaluate(choice).scores["f0"] == best


def check_reports_are_json(case: StrategyCase) -> None:
    """`stop_reasons` and `diagnostics` are JSON, calling them changes nothing, and there is no reason to stop at the start."""
    strategy = case.make()
    assert dict(strategy.stop_reasons()) == {}
    quiet = Driver(case, case.make()).run(40)
    canonical_json(dict(strategy.diagnostics()))
    strategy = Driver(case, strategy).run(40).strategy
    canonical_json(dict(strategy.stop_reasons()))
    canonical_json(dict(strategy.diagnostics()))
    assert canonical_json(strategy.state_dict()) == canonical_json(quiet.strategy.state_dict())


def seeds_of(case: StrategyCase) -> tuple[list[Candidate], list[Evaluation]]:
    """Three known points, the last of which failed."""
    points = [0.2, 0.5, 1.0]
    candidates = [Candidate(f"source:{i}", VectorGenome((value,) * case.dimension)) for i, value in enumerate(points)]
    statuses = [Status.OK, Status.OK, Status.FAILED]
    return candidates, [
        case.evaluate(candidate, status) for candidate, status in zip(candidates, statuses, strict=True)
    ]


def check_seeds(case: StrategyCase) -> None:
    """Seeds are considered by `recommend`, survive a resume, and are refused if they come late or do not fit."""
    candidates, evaluations = seeds_of(case)
    strategy = case.make()
    strategy.seed(candidates, evaluations)
    assert strategy.recommend() in candidates[:2]
    driver = Driver(case, strategy).run(20)
    again = restored(case, driver.saved()).run(20)
    driver.trace.clear()
    assert driver.run(20).trace == again.trace
    _assert_raises(EvaluationError, lambda: strategy.seed(candidates, evaluations))
    _assert_raises(EvaluationError, lambda: case.make().seed(candidates, evaluations[:1]))
    _assert_raises(EvaluationError, lambda: case.make().seed(candidates[:1] * 2, evaluations[:1] * 2))
    for values in ((0.5,) * (case.dimension + 1), (1.5,) * case.dimension):
        stranger = Candidate("source:9", VectorGenome(values))
        _assert_raises(SpaceError, partial(case.make().seed, [stranger], [case.evaluate(stranger)]))
    posing = Candidate("c000001", VectorGenome((0.5,) * case.dimension))
    _assert_raises(EvaluationError, lambda: case.make().seed([posing], [case.evaluate(posing)]))


def check_resume(case: StrategyCase) -> None:
    """run(n + m) equals run(n), save as JSON, load, run(m), bit for bit and from any point."""
    whole = Driver(case, case.make()).run(45)
    driver = Driver(case, case.make())
    for n_tells in (0, 1, 7, 12, 25):
        before = driver.run(n_tells).trace
        again = restored(case, driver.saved())
        assert canonical_json(again.strategy.state_dict()) == canonical_json(driver.strategy.state_dict())
        driver = Driver(case, again.strategy, again.pending, again.n_told)
        driver.trace = before
    assert driver.trace == whole.trace


def _repeated(strategy: Strategy, driver: Driver) -> list[bool]:
    """Replay the history of another strategy in a fresh one; return whether each proposal was the same."""
    same = []
    for event in driver.history:
        if isinstance(event, Candidate):
            same.append(strategy.repeat(event))
        else:
            strategy.tell([event])
    return same


def check_repeat(case: StrategyCase) -> None:
    """Repeated proposals are the same; `repeat` refuses a candidate that is not the next one."""
    driver = Driver(case, case.make()).run(30)
    strategy = case.make()
    assert all(_repeated(strategy, driver))
    _assert_raises(JournalError, lambda: strategy.repeat(driver.trace[0]))
    other = Driver(case, strategy, driver.pending, driver.n_told)
    driver.trace.clear()
    assert other.run(20).trace == driver.run(20).trace


def check_repeat_elsewhere(case: StrategyCase) -> None:
    """If proposals differ, as on another processor, the recorded candidates are used and the search continues.

    Another seed simulates the other processor: no proposal that draws random numbers is the same.
    """
    driver = Driver(case, case.make()).run(50)
    strategy = case.make(seed=8)
    assert not all(_repeated(strategy, driver))
    assert strategy.recommend() == driver.strategy.recommend()
    other = Driver(case, strategy, driver.pending, driver.n_told)
    loaded = case.make(seed=8)
    loaded.load_state_dict(json.loads(canonical_json(strategy.state_dict())))
    assert canonical_json(loaded.state_dict()) == canonical_json(strategy.state_dict())
    other.run(40)
    for candidate in other.trace:
        assert candidate.id not in {known.id for known in driver.trace}
        _check_inside(case, candidate)


def check_state_is_guarded(case: StrategyCase) -> None:
    """A state for another seed or a damaged one is refused, and so is loading into a strategy that is not fresh."""
    strategy = Driver(case, case.make()).run(10).strategy
    state = cast(dict[str, Any], json.loads(canonical_json(strategy.state_dict())))
    _assert_raises(JournalError, lambda: strategy.load_state_dict(state))
    _assert_raises(JournalError, lambda: case.make(seed=8).load_state_dict(state))
    _assert_raises(JournalError, lambda: case.make().load_state_dict({}))
    _assert_raises(JournalError, lambda: case.make().load_state_dict({**state, "log": 3}))


def _assert_raises(error: type[Exception], action: Callable[[], object]) -> None:
    message = None
    try:
        action()
    except error as raised:
        message = str(raised)
    assert message, f"expected {error.__name__} with a message"


STRATEGY_CHECKS: tuple[Callable[[StrategyCase], None], ...] = (
    check_bounds_and_ids,
    check_determinism,
    check_ask_many_is_ask_one_often,
    check_many_pending,
    check_empty_ask_changes_nothing,
    check_tell_refuses_strangers,
    check_failures,
    check_equal_scores,
    check_recommend,
    check_reports_are_json,
    check_seeds,
    check_resume,
    check_repeat,
    check_repeat_elsewhere,
    check_state_is_guarded,
)
