"""Strategies under test with their options, and a `Driver` that keeps several candidates pending, tells them out of order
and lets some fail.

`evomerge.testing.strategy_checks` contains the checks; `resume_in_new_process` runs many strategies in one fresh interpreter.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from evomerge.core import (
    Candidate,
    Direction,
    Evaluation,
    Json,
    Objective,
    Split,
    Status,
    VectorGenome,
    canonical_json,
    genome_from_json,
    genome_to_json,
    random_stream,
)
from evomerge.space import Parameter, SearchSpace
from evomerge.strategy import Strategy, make_strategy, strategy_names


@dataclass(frozen=True)
class StrategyCase:
    """A strategy by name, with its arguments; with `sometimes_used`, the space has four dimensions, some of which do not always have an effect."""

    name: str
    dimension: int = 4
    n_objectives: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[int, ...] | None = None
    families: tuple[int, ...] | None = None
    sometimes_used: bool = False

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        kinds = {"mixed": self.choices, "families": self.families, "sometimes": self.sometimes_used}
        kind = "".join(f"-{kind}" for kind, given in kinds.items() if given)
        return f"{self.name}-{self.dimension}d-{self.n_objectives}obj{kind}" + (f"-{options}" if options else "")

    def objectives(self) -> list[Objective]:
        """`f0` is maximised (its score is the negative distance), the others are minimised."""
        return [
            Objective(f"f{index}", Direction.MAXIMIZE if index == 0 else Direction.MINIMIZE)
            for index in range(self.n_objectives)
        ]

    def make(self, seed: int = 7) -> Strategy:
        """A fresh strategy."""
        parts = {"dimension": self.dimension, "choices": self.choices, "families": self.families}
        made_from: Mapping[str, Any] = {"space": _SOMETIMES_USED} if self.sometimes_used else parts
        return make_strategy(self.name, objectives=self.objectives(), seed=seed, **made_from, **self.options)

    def point(self, candidate: Candidate) -> NDArray[np.float64]:
        """A candidate's coordinates (d,); for a crossover, whose parents are not available, made-up coordinates determined by the genome."""
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

_SOMETIMES_USED = SearchSpace(
    [
        Parameter.categorical("method", ("plain", "weighted")),
        *[Parameter(f"weight[{number}]", 0.0, 1.0, used_with=("method", (1,))) for number in range(3)],
    ]
)
"""with the method "plain", whose parameters have no effect, all points are equivalent"""

OPTIONS_IN_CASES: Mapping[str, Sequence[StrategyCase]] = {
    "bo": (
        StrategyCase("bo", dimension=2, n_objectives=1, options={**_CHEAP_BO, "n_initial": 32, "trust_region": "on"}),
    ),
    "catcma": (
        StrategyCase("catcma", n_objectives=1, options={"population_size": 4}, choices=(0, 3, 2, 0)),
        StrategyCase("catcma", dimension=2, options={"start": "centre"}, choices=(2, 5)),
    ),
    "cycleqd": (
        StrategyCase("cycleqd", n_objectives=3, options={"n_initial": 8, "crossover_sigma": 0.5}),
        StrategyCase("cycleqd", options={"n_initial": 4, "n_bins": 3}, choices=(0, 3, 2, 0)),
    ),
    "ga": (
        StrategyCase("ga", options={"population_size": 6}, choices=(0, 3, 2, 0)),
        StrategyCase("ga", sometimes_used=True),
    ),
    "cma_es": (
        StrategyCase("cma_es", n_objectives=1, options={"variant": "sep"}),
        StrategyCase("cma_es", n_objectives=1, options={"variant": "vkd", "restarts": "none"}),
        StrategyCase("cma_es", dimension=2, options={"item_noise": True}),
        StrategyCase("cma_es", n_objectives=1, options={"surrogate": "diagonal"}),
        StrategyCase("cma_es", dimension=2, n_objectives=1, options={"surrogate": "none", "population_size": 4}),
        StrategyCase("cma_es", dimension=1, n_objectives=1, options={"restarts": "bipop", "population_size": 4}),
        StrategyCase("cma_es", dimension=1, n_objectives=1, options={"surrogate": "none", "restarts": "bipop"}),
        StrategyCase("cma_es", dimension=14, n_objectives=1, families=(0, 1) * 7),
        StrategyCase("cma_es", n_objectives=1, options={"group_correlation": 0.5}, families=(0, 1, 1, 2)),
        StrategyCase("cma_es", n_objectives=1, sometimes_used=True),
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
        StrategyCase("map", options={"model": "diagonal"}),
        StrategyCase("map", dimension=5, options={"nested": True, "pair_points": 6}),
        StrategyCase("map", dimension=3, options={"nested": True, "bayesian": True, "pair_points": 6}),
    ),
    "map_elites": (StrategyCase("map_elites", n_objectives=3, options={"n_initial": 6, "mutation_sigma": 0.0}),),
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
    "nsga2": (
        StrategyCase("nsga2", n_objectives=3, options={"population_size": 6}),
        StrategyCase("nsga2", options={"group_correlation": 0.5}, families=(0, 1, 1, 0)),
    ),
}
"""Further cases of built-in strategies, in addition to the default options."""

_LIBRARIES: Mapping[str, str] = {"bo": "botorch", "nevergrad": "nevergrad", "optuna": "optuna"}
"""Built-in strategy -> the library from its optional extra."""

_CHEAP: Mapping[str, Mapping[str, Any]] = {"bo": _CHEAP_BO}
"""Replaces default options that would take seconds per proposal."""


def strategy_cases() -> list[StrategyCase]:
    """Every registered strategy, including plugins, with default options, and the further cases of built-in ones."""
    cases = [StrategyCase(name, options=_CHEAP.get(name, {})) for name in strategy_names()]
    return cases + [case for name in sorted(OPTIONS_IN_CASES) for case in OPTIONS_IN_CASES[name]]


def lacking_library(strategy: str) -> str | None:
    """The library that a built-in strategy needs, if it is not installed; else None."""
    library = _LIBRARIES.get(strategy)
    return None if library is None or importlib.util.find_spec(library) is not None else library


class Driver:
    """Runs a strategy on a fixed, irregular schedule: four candidates pending, told out of order, and every seventh fails."""

    def __init__(
        self, case: StrategyCase, strategy: Strategy, pending: Sequence[Candidate] = (), n_told: int = 0
    ) -> None:
        self.case = case
        self.strategy = strategy
        self.pending = list(pending)
        self.n_told = n_told
        self.trace: list[Candidate] = []
        self.history: list[Candidate | Evaluation] = []
        """asked candidates and told evaluations, in order"""

    def run(self, n_tells: int) -> "Driver":
        """Continue until `n_tells` more results have been told."""
        for _ in range(n_tells):
            asked = list(self.strategy.ask(4 - len(self.pending)))
            self.trace += asked
            self.pending += asked
            self.history += asked
            assert self.pending, "a strategy with nothing pending must propose something"
            candidate = self.pending.pop((self.n_told * 3) % len(self.pending))
            failed = int(candidate.id[1:]) % 7 == 0
            evaluation = self.case.evaluate(candidate, Status.FAILED if failed else Status.OK)
            self.strategy.tell([evaluation])
            self.history.append(evaluation)
            self.n_told += 1
        return self

    def saved(self) -> dict[str, Json]:
        """Strategy state and pending candidates, as stored in a run directory."""
        state = json.loads(canonical_json(self.strategy.state_dict()))
        pending = [[item.id, genome_to_json(item.genome), list(item.parents)] for item in self.pending]
        return {"state": state, "pending": pending, "n_told": self.n_told}


def restored(case: StrategyCase, saved: Mapping[str, Any]) -> Driver:
    """A driver that continues from `Driver.saved`."""
    strategy = case.make()
    strategy.load_state_dict(saved["state"])
    pending = [Candidate(name, genome_from_json(genome), tuple(parents)) for name, genome, parents in saved["pending"]]
    return Driver(case, strategy, pending, saved["n_told"])


def resume_in_new_process(jobs: Sequence[tuple[StrategyCase, Mapping[str, Json]]], n_tells: int) -> list[list[Any]]:
    """Restore every (case, saved) in one new interpreter and run `n_tells` more; return the proposals as [id, genome]."""
    request = {
        "n_tells": n_tells,
        "jobs": [{"case": asdict(case), "saved": saved} for case, saved in jobs],
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
    """The child process of `resume_in_new_process`."""
    request = json.load(sys.stdin)
    answers = []
    for job in request["jobs"]:
        driver = restored(StrategyCase(**job["case"]), job["saved"]).run(request["n_tells"])
        answers.append([[candidate.id, genome_to_json(candidate.genome)] for candidate in driver.trace])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _serve()
