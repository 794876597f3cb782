"""`strategy: auto` becomes what docs/strategies.md advises, reports it, and does not change afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from evomerge.build import describe, make_problem, open_run, parse_config, resume_search, start_search, strategies
from evomerge.build.commands import runs
from evomerge.build.strategies import chosen_strategy
from evomerge.core import ConfigError
from evomerge.search import leader


def problem(function: str, dimension: int, **changes: Any) -> Any:
    settings = {
        "strategy": "auto",
        "evaluation": {"kind": "synthetic", "function": function, "dimension": dimension, "n_items": 10},
        "cluster": {"kind": "local", "workers": 1},
        "budget": {"evaluations": 12},
        "finals": {"finalists": 0},
        "deterministic": True,
        **changes,
    }
    return make_problem(parse_config(settings, folder=Path("/")))


@pytest.mark.parametrize(
    ("function", "dimension", "expected"),
    [("sphere", 5, "cma_es"), ("zdt1", 8, "map"), ("zdt1", 20, "map"), ("zdt1", 21, "cycleqd"), ("dtlz2", 7, "map")],
)
def test_auto_follows_the_guide(function: str, dimension: int, expected: str) -> None:
    found = problem(function, dimension, budget={"evaluations": 200})
    assert chosen_strategy(found).name == expected
    assert describe(found)[0].startswith(f"strategy    {expected} (auto: ")


@pytest.mark.parametrize(
    ("budget", "expected"),
    [({"evaluations": 65}, "cycleqd"), ({"evaluations": 66}, "map"), ({"items": 100}, "map"), ({"hours": 1}, "map")],
)
def test_auto_does_not_spend_a_small_budget_on_the_design_of_map(budget: dict[str, int], expected: str) -> None:
    assert chosen_strategy(problem("zdt1", 8, budget=budget)).name == expected


def test_a_run_keeps_the_strategy_that_auto_chose(tmp_path: Path) -> None:
    start_search(problem("sphere", 3).config, tmp_path / "run")
    resume_search(tmp_path / "run", overrides=["budget.evaluations=15"])
    first = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0][9:])
    assert first["strategy"] == "cma_es"


def test_a_run_keeps_what_auto_chose_in_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"population_size": 6}
    with monkeypatch.context() as earlier:
        for module in (strategies, runs):
            earlier.setattr(module, "chosen_strategy", lambda problem: strategies.Choice("nsga2", "as it was"))
        start_search(problem("zdt1", 21, strategy={"name": "auto", **options}).config, tmp_path / "run")
    start_search(problem("zdt1", 21, strategy={"name": "nsga2", **options}).config, tmp_path / "other")
    for name in ("run", "run", "other"):
        resume_search(tmp_path / name, overrides=["budget.evaluations=18"])
    assert "cannot be reproduced" not in caplog.text
    points, others = ([row["x3"] for row in open_run(tmp_path / name).records()] for name in ("run", "other"))
    assert points == others
    assert len(points) == 18


def test_options_are_checked_against_the_chosen_strategy() -> None:
    assert chosen_strategy(problem("sphere", 3, strategy={"name": "auto", "sigma0": 0.3})).name == "cma_es"
    with pytest.raises(Exception, match="map has no option 'sigma0'"):
        problem("zdt1", 3, strategy={"name": "auto", "sigma0": 0.3}, budget={"evaluations": 24})


@pytest.mark.parametrize("strategy", ["cma_es", {"name": "ga", "population_size": 6}])
def test_weights_of_objectives_decide_which_candidate_is_best(strategy: Any, tmp_path: Path) -> None:
    """Two objectives pull towards opposite corners, and the heavier one wins."""
    best = {}
    for heavy in ("f1", "f2"):
        goals = [{"name": name, "weight": 9 if name == heavy else 1} for name in ("f1", "f2")]
        config = problem("zdt1", 4, strategy=strategy, objectives=goals, budget={"evaluations": 60}).config
        start_search(config, tmp_path / heavy)
        resume_search(tmp_path / heavy, overrides=["budget.evaluations=70"])
        run = open_run(tmp_path / heavy)
        best[heavy] = run.evaluation(str(leader(run.state))).scores
        means = [
            (9 * row.scores[heavy] + sum(row.scores.values()) - row.scores[heavy]) / 10 for row in run.state.evaluated()
        ]
        assert max(means) == pytest.approx((8 * best[heavy][heavy] + sum(best[heavy].values())) / 10)
    assert best["f1"]["f1"] > best["f2"]["f1"]
    assert best["f2"]["f2"] > best["f1"]["f2"]


def test_strategy_weights_of_an_older_configuration_become_objective_weights() -> None:
    old = {
        "strategy": {"name": "cma_es", "weights": {"f1": 1, "cost.items": 0.01}},
        "objectives": ["f1", "cost.items"],
    }
    new = {"strategy": "cma_es", "objectives": [{"name": "f1", "weight": 1}, {"name": "cost.items", "weight": 0.01}]}
    assert problem("sphere", 3, **old).config == problem("sphere", 3, **new).config
    goals = problem("sphere", 3, strategy={"name": "cma_es", "weights": {"f1": 2}}).objectives
    assert [(goal.name, goal.weight) for goal in goals] == [("f1", 2.0)]
    for wrong in ({"f2": 1}, {"f1": 1, "f2": 1}, {}):
        with pytest.raises(ConfigError, match=r"strategy\.weights: set the weight of each objective instead"):
            problem("sphere", 3, strategy={"name": "cma_es", "weights": wrong}, objectives=["f1"])


def test_a_test_function_has_no_model_costs() -> None:
    with pytest.raises(
        ConfigError, match=r"no task produces 'cost.layers'; known: f1, cost.items, cost.engine_s, cost.total_s"
    ):
        problem("sphere", 3, objectives=["f1", "cost.layers"])


@pytest.mark.parametrize("weights", [[0], [-1], ["x"]])
def test_invalid_weights_are_reported(weights: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"objectives(\.0\.weight)?: .*(0|number)"):
        problem("sphere", 3, objectives=[{"name": "f1", "weight": weight} for weight in weights])


@pytest.mark.parametrize(
    ("strategy", "objectives", "noted"),
    [
        ("cma_es", ["f1", "cost.engine_s"], True),
        ("ga", ["f1", "cost.items"], True),
        ("cma_es", ["f1", {"name": "cost.items", "weight": 0.01}], False),
        ({"name": "cma_es", "weights": {"f1": 1, "cost.items": 0.01}}, ["f1", "cost.items"], False),
        ("cma_es", ["f1"], False),
        ("cma_es", ["cost.items"], False),
        ("auto", ["f1", "cost.items"], False),
    ],
)
def test_a_cost_that_does_not_count_is_noted(strategy: Any, objectives: list[Any], noted: bool) -> None:
    lines = describe(problem("sphere", 3, strategy=strategy, objectives=objectives))
    assert any("has weight 0; give it a weight" in line for line in lines) == noted


def test_linear_algebra_uses_one_thread_during_a_search(tmp_path: Path) -> None:
    import scipy.linalg  # noqa: F401 - its BLAS is counted too

    def threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    seen = []
    with threadpool_limits(2, user_api="blas"):
        start_search(
            problem("sphere", 3).config, tmp_path / "run", observers=[lambda state, evaluation: seen.append(threads())]
        )
        assert threads() == {2}
    assert len(seen) == 12
    assert all(counts == {1} for counts in seen)
