"""The contract of a strategy as checks that any test runner can call: every check takes a `StrategyCase` and asserts.

    @pytest.mark.parametrize("check", STRATEGY_CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("case", strategy_cases(), ids=str)
    def test_contract(case, check):
        check(case)

`resume_in_new_process` runs many cases in one fresh interpreter. Strategies are driven by `Driver`, which keeps several
candidates pending, tells them out of order and lets some fail.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from evomerge.core import (
    Candidate,
    ConfigError,
    CrossoverGenome,
    Direction,
    Evaluation,
    EvaluationError,
    JournalError,
    Json,
    Objective,
    SpaceError,
    Split,
    Status,
    VectorGenome,
    canonical_json,
    genome_from_json,
    genome_to_json,
    random_stream,
)
from evomerge.strategy import Strategy, make_strategy, strategy_names


@dataclass(frozen=True)
class StrategyCase:
    """A strategy by name, with what it is made from."""

    name: str
    dimension: int = 4
    n_objectives: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        mixed = "-mixed" if self.choices else ""
        return f"{self.name}-{self.dimension}d-{self.n_objectives}obj{mixed}" + (f"-{options}" if options else "")

    def objectives(self) -> list[Objective]:
        """`f0` is maximised (its score is the negative distance), the others are minimised."""
        return [
            Objective(f"f{index}", Direction.MAXIMIZE if index == 0 else Direction.MINIMIZE)
            for index in range(self.n_objectives)
        ]

    def make(self, seed: int = 7) -> Strategy:
        """A fresh strategy."""
        return make_strategy(
            self.name,
            dimension=self.dimension,
            objectives=self.objectives(),
            seed=seed,
            choices=self.choices,
            **dict(self.options),
        )

    def point(self, candidate: Candidate) -> NDArray[np.float64]:
        """A candidate's coordinates (d,); a crossover, whose parents are not at hand, has made-up ones that follow from it."""
        if isinstance(candidate.genome, VectorGenome):
            return np.asarray(candidate.genome.values)
        name = canonical_json(genome_to_json(candidate.genome))
        return random_stream(0, "strategy_suite", name).random(self.dimension)

    def evaluate(self, candidate: Candidate, status: Status = Status.OK) -> Evaluation:
        """Distances of the candidate to one target point per objective."""
        if status is not Status.OK:
            return Evaluation(candidate.id, Split.SEARCH, status, error="made to fail")
        point = self.point(candidate)
        scores = {}
        for index in range(self.n_objectives):
            distance = float(np.sum((point - 0.2 - 0.6 * index / max(self.n_objectives - 1, 1)) ** 2))
            scores[f"f{index}"] = -distance if index == 0 else distance
        thresholds = np.linspace(0.0, 1.0, 11)
        items = {name: (abs(score) < thresholds).astype(np.float32) for name, score in scores.items()}
        stderr = dict.fromkeys(scores, 0.01)
        return Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores, stderr=stderr, item_scores=items)


_CHEAP_BO: Mapping[str, Any] = {
    "n_initial": 42,
    "n_samples": 2,
    "n_restarts": 1,
    "n_raw": 4,
    "max_iterations": 2,
    "refit_growth": 2.0,
}

OPTIONS_IN_CASES: Mapping[str, Sequence[StrategyCase]] = {
    "bo": (
        StrategyCase("bo", dimension=2, n_objectives=1, options={**_CHEAP_BO, "n_initial": 32, "trust_region": "on"}),
    ),
    "catcma": (
        StrategyCase("catcma", n_objectives=1, options={"population_size": 4}, choices=(0, 3, 2, 0)),
        StrategyCase("catcma", dimension=2, options={"start": "centre"}, choices=(2, 5)),
    ),
    "ga": (StrategyCase("ga", options={"population_size": 6}, choices=(0, 3, 2, 0)),),
    "cma_es": (
        StrategyCase("cma_es", n_objectives=1, options={"variant": "sep", "weights": {"f0": 2.0}}),
        StrategyCase("cma_es", n_objectives=1, options={"variant": "vkd", "restarts": "none"}),
        StrategyCase("cma_es", dimension=2, options={"item_noise": True}),
        StrategyCase("cma_es", dimension=2, n_objectives=1, options={"surrogate": "none", "population_size": 4}),
        StrategyCase("cma_es", dimension=1, n_objectives=1, options={"restarts": "bipop", "population_size": 4}),
        StrategyCase("cma_es", dimension=1, n_objectives=1, options={"surrogate": "none", "restarts": "bipop"}),
    ),
    "m2n2": (
        StrategyCase("m2n2", n_objectives=1, options={"population_size": 5, "chromosomes": 2, "mutation_sigma": 0.01}),
        StrategyCase("m2n2", options={"attraction": False, "split_point": False, "population_size": 5, "alpha": 0.0}),
        StrategyCase("m2n2", n_objectives=1, options={"on": "recipes", "population_size": 5, "mutation_sigma": 0.0}),
        StrategyCase("m2n2", options={"on": "recipes", "split_point": False, "population_size": 5, "from_worst": True}),
    ),
    "map": (
        StrategyCase("map", dimension=2, n_objectives=1, options={"n_initial": 5}),
        StrategyCase("map", dimension=2, n_objectives=3, options={"link": "identity"}),
        StrategyCase("map", dimension=3, options={"bayesian": True}),
        StrategyCase("map", dimension=5, options={"nested": True, "pair_points": 6}),
        StrategyCase("map", dimension=3, options={"nested": True, "bayesian": True, "pair_points": 6}),
    ),
    "nevergrad": (
        StrategyCase("nevergrad", n_objectives=1, options={"l1": 0.15, "budget": 40}),
        StrategyCase("nevergrad", n_objectives=1, options={"optimizer": "CMA", "n_workers": 4}),
        StrategyCase("nevergrad", options={"optimizer": "TwoPointsDE", "n_workers": 4}),
    ),
    "age_moea2": (StrategyCase("age_moea2", n_objectives=3, options={"population_size": 6}),),
    "nsga3": (StrategyCase("nsga3", n_objectives=3, options={"population_size": 6}),),
    "optuna": (
        StrategyCase("optuna", n_objectives=1),
        StrategyCase("optuna", options={"sampler": "NSGAIISampler", "sampler_options": {"population_size": 8}}),
        StrategyCase("optuna", options={"sampler": "QMCSampler"}),
    ),
    "sms_emoa": (StrategyCase("sms_emoa", n_objectives=3, options={"population_size": 6}),),
    "nsga2": (StrategyCase("nsga2", n_objectives=3, options={"population_size": 6}),),
}
"""Further cases of our own strategies, beside the default options."""

_CHEAP: Mapping[str, Mapping[str, Any]] = {"bo": _CHEAP_BO}
"""Stands for the default options where those would take seconds per proposal."""


def strategy_cases() -> list[StrategyCase]:
    """Every registered strategy, plugins too, with default options, and the further cases of our own."""
    cases = [StrategyCase(name, options=_CHEAP.get(name, {})) for name in strategy_names()]
    return cases + [case for name in sorted(OPTIONS_IN_CASES) for case in OPTIONS_IN_CASES[name]]


class Driver:
    """Runs a strategy on a fixed, jumbled schedule: four pending, told last in first out in part, each seventh fails."""

    def __init__(
        self, case: StrategyCase, strategy: Strategy, pending: Sequence[Candidate] = (), n_told: int = 0
    ) -> None:
        self.case = case
        self.strategy = strategy
        self.pending = list(pending)
        self.n_told = n_told
        self.trace: list[Candidate] = []

    def run(self, n_tells: int) -> "Driver":
        """Goes on until `n_tells` more results were told."""
        for _ in range(n_tells):
            asked = list(self.strategy.ask(4 - len(self.pending)))
            self.trace += asked
            self.pending += asked
            assert self.pending, "a strategy with nothing pending must propose something"
            candidate = self.pending.pop((self.n_told * 3) % len(self.pending))
            failed = int(candidate.id[1:]) % 7 == 0
            self.strategy.tell([self.case.evaluate(candidate, Status.FAILED if failed else Status.OK)])
            self.n_told += 1
        return self

    def saved(self) -> dict[str, Json]:
        """Strategy state and pending candidates, as they would be found in a run directory."""
        state = json.loads(canonical_json(self.strategy.state_dict()))
        pending = [[item.id, genome_to_json(item.genome), list(item.parents)] for item in self.pending]
        return {"state": state, "pending": pending, "n_told": self.n_told}


def restored(case: StrategyCase, saved: Mapping[str, Any]) -> Driver:
    """A driver that goes on from `Driver.saved`."""
    strategy = case.make()
    strategy.load_state_dict(saved["state"])
    pending = [Candidate(name, genome_from_json(genome), tuple(parents)) for name, genome, parents in saved["pending"]]
    return Driver(case, strategy, pending, saved["n_told"])


def check_bounds_and_ids(case: StrategyCase) -> None:
    """Proposals are points of [0, 1]^d, or crossovers of their parents, with unique ids in order; parents are known ids."""
    driver = Driver(case, case.make()).run(60)
    ids = [candidate.id for candidate in driver.trace]
    assert len(ids) == len(set(ids))
    assert ids == sorted(ids)
    for candidate in driver.trace:
        genome = candidate.genome
        assert genome_from_json(json.loads(canonical_json(genome_to_json(genome)))) == genome
        if isinstance(genome, CrossoverGenome):
            assert genome.parents == candidate.parents
            values, expected = (genome.mix, *genome.splits), len(genome.splits) + 1
        else:
            values, expected = genome.values, case.dimension
        assert len(values) == expected
        assert all(isinstance(value, float) and 0.0 <= value <= 1.0 for value in values)
        assert all(parent in ids and parent < candidate.id for parent in candidate.parents)


def check_determinism(case: StrategyCase) -> None:
    """The same seed and calls give the same proposals; another seed gives others; global random state is not touched."""
    first = Driver(case, case.make()).run(40).trace
    global_state = str(np.random.get_state(legacy=False))  # noqa: NPY002 - it must stay as it is
    second = Driver(case, case.make()).run(40).trace
    assert str(np.random.get_state(legacy=False)) == global_state  # noqa: NPY002
    assert first == second
    assert first != Driver(case, case.make(seed=8)).run(40).trace


def check_ask_many_is_ask_one_often(case: StrategyCase) -> None:
    """`ask(n)` equals n times `ask(1)`; pending candidates need no answer before the next ask."""
    at_once = list(case.make().ask(6))
    strategy = case.make()
    one_by_one = [candidate for _ in range(6) for candidate in strategy.ask(1)]
    assert at_once
    assert at_once == one_by_one


def check_empty_ask_changes_nothing(case: StrategyCase) -> None:
    """An empty answer leaves the state and all later proposals as they were."""
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
    """Unknown, repeated and incomplete results raise a typed error and nothing of the call is learned."""
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
    """All-failed runs go on proposing; recommend says that there is nothing; NaN counts as failed."""
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


def check_recommend(case: StrategyCase) -> None:
    """The recommendation was evaluated well, and with one objective nothing told is better."""
    driver = Driver(case, case.make()).run(50)
    told = [candidate for candidate in driver.trace if candidate not in driver.pending and int(candidate.id[1:]) % 7]
    choice = driver.strategy.recommend()
    assert choice in told
    if case.n_objectives == 1:
        best = max(case.evaluate(candidate).scores["f0"] for candidate in told)
        assert case.evaluate(choice).scores["f0"] == best


def check_reports_are_json(case: StrategyCase) -> None:
    """`stop_reasons` and `diagnostics` are JSON, asking for them changes nothing, and there is no reason to stop at the start."""
    strategy = case.make()
    assert dict(strategy.stop_reasons()) == {}
    quiet = Driver(case, case.make()).run(40)
    canonical_json(dict(strategy.diagnostics()))
    strategy = Driver(case, strategy).run(40).strategy
    canonical_json(dict(strategy.stop_reasons()))
    canonical_json(dict(strategy.diagnostics()))
    assert canonical_json(strategy.state_dict()) == canonical_json(quiet.strategy.state_dict())


def seeds_of(case: StrategyCase) -> tuple[list[Candidate], list[Evaluation]]:
    """Three known points, one of which failed."""
    points = [0.2, 0.5, 1.0]
    candidates = [Candidate(f"source:{i}", VectorGenome((value,) * case.dimension)) for i, value in enumerate(points)]
    statuses = [Status.OK, Status.OK, Status.FAILED]
    return candidates, [
        case.evaluate(candidate, status) for candidate, status in zip(candidates, statuses, strict=True)
    ]


def check_seeds(case: StrategyCase) -> None:
    """Seeds count for `recommend`, survive a resume, and are refused where they come late or do not fit."""
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
    """run(n + m) equals run(n), save as JSON, load, run(m): bit for bit, from any point."""
    whole = Driver(case, case.make()).run(45)
    driver = Driver(case, case.make())
    for n_tells in (0, 1, 7, 12, 25):
        before = driver.run(n_tells).trace
        again = restored(case, driver.saved())
        assert canonical_json(again.strategy.state_dict()) == canonical_json(driver.strategy.state_dict())
        driver = Driver(case, again.strategy, again.pending, again.n_told)
        driver.trace = before
    assert driver.trace == whole.trace


def check_state_is_guarded(case: StrategyCase) -> None:
    """A state of another seed, a damaged one, and one that cannot be reproduced are refused."""
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
    check_empty_ask_changes_nothing,
    check_tell_refuses_strangers,
    check_failures,
    check_recommend,
    check_reports_are_json,
    check_seeds,
    check_resume,
    check_state_is_guarded,
)


def resume_in_new_process(jobs: Sequence[tuple[StrategyCase, Mapping[str, Json]]], n_tells: int) -> list[list[Any]]:
    """Restores every (case, saved) in one new interpreter and runs `n_tells` more; the proposals as [id, genome]."""
    request = {
        "n_tells": n_tells,
        "jobs": [
            {"case": [case.name, case.dimension, case.n_objectives, dict(case.options), case.choices], "saved": saved}
            for case, saved in jobs
        ],
    }
    finished = subprocess.run(
        [sys.executable, "-m", "evomerge.testing.strategy_suite"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return cast(list[list[Any]], json.loads(finished.stdout))


def _serve() -> None:
    """The other side of `resume_in_new_process`."""
    request = json.load(sys.stdin)
    answers = []
    for job in request["jobs"]:
        driver = restored(StrategyCase(*job["case"]), job["saved"]).run(request["n_tells"])
        answers.append([[candidate.id, genome_to_json(candidate.genome)] for candidate in driver.trace])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _serve()
