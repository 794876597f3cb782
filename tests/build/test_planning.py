"""Plans predict what a search then does."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from evomerge.build import make_problem, parse_config, start_search
from evomerge.build.commands import planning
from evomerge.core import ConfigError, Split
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


def problem(**changes: Any) -> Any:
    settings = {
        "strategy": "random",
        "evaluation": {"kind": "synthetic", "function": "zdt1", "dimension": 5, "n_items": 10},
        "cluster": {"kind": "local", "workers": 4},
        "budget": {"evaluations": 100},
        "finals": {"finalists": 4},
        **changes,
    }
    return make_problem(parse_config(settings, folder=Path("/")))


def same(seconds: float, items: float | None = None) -> planning.Times:
    return planning.Times({Split.SEARCH: [seconds]}, items)


def test_with_equal_times_workers_idle_only_at_the_start_and_end() -> None:
    plan = planning.simulate(problem(), same(10.0), 4, price=3.6)
    assert plan.evaluations == 100 + 4 + 1
    assert plan.wall_s == pytest.approx(250 + 10 + 10)
    assert plan.utilisation == pytest.approx(1050 / (4 * 270))
    assert plan.cost == pytest.approx(4 * 270 / 3600 * 3.6)
    rough = planning.forecast(problem(), same(10.0), 4, price=3.6)
    assert rough.wall_s == pytest.approx(plan.wall_s)
    assert rough.cost == pytest.approx(plan.cost)


def test_waiting_for_the_oldest_candidate_makes_a_deterministic_search_slower() -> None:
    uneven = planning.Times({Split.SEARCH: [1.0] * 9 + [50.0]})
    free = planning.simulate(problem(), uneven, 8)
    ordered = planning.simulate(problem(deterministic=True), uneven, 8)
    assert ordered.wall_s > 1.3 * free.wall_s
    assert free.utilisation > ordered.utilisation


def test_long_searches_are_extrapolated_at_the_simulated_pace() -> None:
    plan = planning.simulate(problem(budget={"evaluations": 20_000}), same(2.0), 4)
    assert plan.evaluations == 20_005
    assert plan.wall_s == pytest.approx(20_000 * 2 / 4, rel=0.01)
    hours = planning.simulate(problem(budget={"hours": 2}), same(60.0), 10)
    assert hours.evaluations == 2 * 60 * 10 + 5


def test_baselines_among_the_finalists_are_counted_once(tmp_path: Path) -> None:
    models = {name: str(write_tiny_llama(tmp_path / name, seed=seed)) for seed, name in enumerate(("base", "a", "b"))}
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    settings = {
        "models": {"base": models.pop("base"), "experts": models},
        "tasks": [str(tmp_path / "toy.yaml")],
        "evaluation": {"kind": "lm_eval"},
        "cluster": {"kind": "local"},
    }
    for n_evaluations in (1, 8, 100):
        wanted = problem(**settings, budget={"evaluations": n_evaluations}, finals={"finalists": 4})
        n_baselines = len(wanted.baselines())
        n_search = max(n_evaluations, n_baselines)
        plan = planning.forecast(wanted, same(1.0), 1)
        assert plan.evaluations == n_search + min(n_search, n_baselines + 4) + min(n_search, n_baselines + 1)
        simulated = planning.simulate(wanted, same(1.0), 1)
        assert simulated.evaluations <= plan.evaluations
        if n_search == n_baselines:
            assert (simulated.evaluations, simulated.wall_s) == (plan.evaluations, plan.wall_s)


@pytest.mark.parametrize("budget", [{"items": 200}, {"evaluations": 30, "items": 200}])
def test_an_item_budget_is_converted_to_candidates_when_their_items_are_known(budget: dict[str, int]) -> None:
    assert planning.n_candidates(problem(budget=budget), same(1.0, items=20.0), 1) == 10


def test_an_item_budget_alone_gives_no_plan_when_items_are_unknown() -> None:
    with pytest.raises(ConfigError, match=r"cannot be computed from budget.items alone; use --from RUN"):
        planning.n_candidates(problem(budget={"items": 200}), same(1.0), 1)


@pytest.mark.parametrize("method", [planning.forecast, planning.simulate])
def test_finals_take_the_times_measured_on_their_splits(method: Any) -> None:
    times = planning.Times({Split.SEARCH: [10.0], Split.SELECT: [70.0]})
    plan = method(problem(), times, 4)
    assert plan.wall_s == pytest.approx(250 + 70 + 10)
    assert plan.utilisation == pytest.approx((1000 + 4 * 70 + 10) / (4 * 330))


@pytest.mark.parametrize("method", [planning.forecast, planning.simulate])
def test_a_budget_below_one_candidate_allows_one(method: Any) -> None:
    """As in a search, where the cost of a candidate is known only after the first."""
    assert method(problem(budget={"items": 5}, finals={"finalists": 0}), same(1.0, items=20.0), 4).evaluations == 1


def test_times_are_measured_from_a_run(tmp_path: Path) -> None:
    wanted = problem(evaluation={"kind": "synthetic", "function": "sphere", "dimension": 3, "delay_s": 0.02})
    started = time.monotonic()
    start_search(wanted.config, tmp_path / "run")
    wall = time.monotonic() - started
    times = planning.measured_times(wanted, tmp_path / "run")
    assert {split: len(seconds) for split, seconds in times.seconds.items()} == {
        Split.SEARCH: 100,
        Split.SELECT: 4,
        Split.REPORT: 1,
    }
    assert all(min(seconds) >= 0.02 for seconds in times.seconds.values())
    assert times.items == 100
    assert planning.simulate(wanted, times, 4).wall_s < wall, "the simulation should leave out the driver and its disk"


def test_a_run_on_other_items_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = problem(budget={"evaluations": 2}, finals={"finalists": 0})
    start_search(wanted.config, tmp_path / "run")
    planning.measured_times(wanted, tmp_path / "run")
    assert caplog.messages == []
    planning.measured_times(problem(budget={"evaluations": 2}), tmp_path / "run")
    assert "has evaluated nothing on select and report; candidates are assumed to" in caplog.messages[0]
    caplog.clear()
    more = {"kind": "synthetic", "function": "zdt1", "dimension": 5, "n_items": 7}
    planning.measured_times(problem(evaluation=more), tmp_path / "run")
    assert "ran with other settings (evaluation.n_items)" in caplog.messages[0]


def test_a_run_without_a_timed_candidate_gives_no_plan(tmp_path: Path) -> None:
    broken = {"kind": "synthetic", "function": "sphere", "failure_rate": 1.0}
    wanted = problem(evaluation=broken, budget={"evaluations": 1}, finals={"finalists": 0})
    start_search(wanted.config, tmp_path / "run")
    with pytest.raises(ConfigError, match="no candidate has been evaluated in this run"):
        planning.measured_times(wanted, tmp_path / "run")


def test_sizes_and_their_json() -> None:
    what = planning.sizes(problem())
    assert (what.dimension, what.n_objectives, what.worker_bytes) == (5, 2, 0)
    text = json.dumps(planning.as_json(what, [planning.forecast(problem(), same(1.0), 2)]))
    assert json.loads(text)["forecasts"][0]["workers"] == 2
