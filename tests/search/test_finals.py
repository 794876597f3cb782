"""Selection on unseen items, and the numbers that are reported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from states import BestWritten, state_of

from evomerge.core import (
    Direction,
    Evaluation,
    EvaluationError,
    JournalError,
    Objective,
    Split,
    Status,
    weights_in_mean,
)
from evomerge.evaluation.lm_eval_evaluator import _item_row
from evomerge.search import (
    FrontFiles,
    RunDirectory,
    RunState,
    event,
    headline,
    indifferent,
    leader,
    mean_with_error,
    overhead,
    remarks_on_finals,
    summarize,
    utility,
    verdict,
)
from evomerge.search.finals import best_on_select, choose_finalists
from evomerge.search.front_files import front_json
from evomerge.search.ranking import front_of, pick, reference_losses
from evomerge.search.summary import paired_difference, tuned_task_arithmetic


def test_finalists_are_the_best_by_mean_and_from_the_front() -> None:
    state = state_of(
        {"a": (0.5, 0.5), "b": (0.6, 0.5), "c": (0.9, 0.0), "d": (0.0, 0.95), "e": (0.4, 0.5), "x": (0.1, 0.1)}
    )
    assert choose_finalists(state, 4) == ["b", "a", "d", "c"]
    assert choose_finalists(state, 100)[-1] == "x"


def test_baselines_do_not_take_up_finalist_places() -> None:
    state = state_of({"a": (0.5, 0.5), "b": (0.3, 0.3)})
    for name, scores in (("source:x", (0.9, 0.9)), ("uniform", (0.8, 0.8))):
        state.apply(event("baseline", id=name, recipe={}, values=None))
        state.apply(
            event(
                "evaluated", id=name, split="search", status="ok", scores=dict(zip("fg", scores, strict=True)), stderr={},
                cost={"items": 10}, error=None, row=None, checksum=None, elapsed_s=1.0,
            )
        )  # fmt: skip
    assert choose_finalists(state, 2) == ["a", "b"]
    assert choose_finalists(state, 1) == ["a"]


def test_the_winner_is_the_best_on_select_not_on_search() -> None:
    search = {"lucky": (0.9, 0.9), "steady": (0.8, 0.8), "broken": (0.99, 0.99)}
    state = state_of(search, {"lucky": (0.6, 0.6), "steady": (0.7, 0.7), "broken": None})
    assert best_on_select(state, ["lucky", "steady", "broken"]) == "steady"
    with pytest.raises(EvaluationError, match="every finalist failed"):
        best_on_select(state, ["broken"])


def test_ties_on_select_go_to_the_better_on_search_then_the_smaller_id() -> None:
    state = state_of({"c": (0.5, 0.5), "b": (0.5, 0.5), "a": (0.4, 0.4)}, dict.fromkeys("abc", (0.3, 0.3)))
    assert best_on_select(state, ["a", "c", "b"]) == "b"


def test_a_baseline_that_failed_on_search_can_still_win_on_select() -> None:
    """A worker that hung while scoring it must not make the finals fail."""
    state = state_of({"a": (0.5, 0.5), "flaky": None}, {"a": (0.3, 0.3), "flaky": (0.4, 0.4)})
    assert best_on_select(state, ["a", "flaky"]) == "flaky"
    tied = state_of({"a": None, "b": (0.1, 0.1)}, dict.fromkeys("ab", (0.3, 0.3)))
    assert best_on_select(tied, ["a", "b"]) == "b"


def test_of_equal_scores_the_cheaper_wins(tmp_path: Path) -> None:
    """Scores of a few items are often equal; a dominated candidate is never the best."""
    goals = [("f", "maximize"), ("cost.layers", "minimize")]
    state = RunState.of(
        [event("run", version=1, objectives=[{"name": n, "direction": d, "reference": None} for n, d in goals])]
    )
    for number, (score, layers) in enumerate([(0.5, 6.0), (0.4, 2.0), (0.5, 4.0), (0.5, 5.0)]):
        name = f"c{number:06d}"
        state.apply(event("asked", id=name, values=[0.5], parents=[], ask_s=0.0))
        for split in ("search", "select"):
            state.apply(
                event(
                    "evaluated", id=name, split=split, status="ok", scores={"f": score}, stderr={}, cost={"layers": layers},
                    error=None, row=None, checksum=None, elapsed_s=1.0,
                )
            )  # fmt: skip
    names = list(state.entries)
    assert leader(state) == best_on_select(state, names) == "c000002"
    assert choose_finalists(state, 4) == ["c000002", "c000003", "c000001", "c000000"]
    written = BestWritten()
    FrontFiles(RunDirectory(tmp_path), state, written).flush(state)
    assert written.ids == ["c000002"]


def test_remarks_on_finals() -> None:
    state = state_of({"a": (0.5, 0.5), "b": (0.3, 0.3)})
    assert remarks_on_finals(state) == []
    state.apply(event("baseline", id="uniform", recipe={}, values=None))
    for happened in (event("stopped", reasons={"evaluations": 2}), event("finalists", ids=["a", "b"])):
        state.apply(happened)
    state.apply(event("best", id="a"))
    state.apply(event("finished"))
    assert remarks_on_finals(state) == []
    state.apply(event("best", id="uniform"))
    (beaten,) = remarks_on_finals(state)
    assert beaten == "no merge found by the search (of 2 in the finals) beats uniform on the select split"
    state.apply(event("asked", id="c", values=[0.5], parents=[], ask_s=0.0))
    first, second = remarks_on_finals(state)
    assert first == beaten
    assert second.startswith("the winner and scores are those of the last finals")
    for happened in (
        event("stopped", reasons={"evaluations": 3}),
        event("finalists", ids=[]),
    ):  # until there is a new winner
        state.apply(happened)
        assert "has continued since" in remarks_on_finals(state)[-1]
    assert remarks_on_finals(state)[0] == (
        "no merge found by the search (none was in the finals) beats uniform on the select split"
    )
    state.apply(event("best", id="b"))
    assert remarks_on_finals(state) == []


def test_pick_by_knee_best_or_id() -> None:
    state = state_of({"c000001": (10.0, 0.0), "c000002": (8.0, 0.7), "c000003": (0.0, 1.0)})
    assert pick(state, "best").id == "c000001"
    assert pick(state, "knee").id == "c000002"
    bulging = state_of({"c000001": (1.0, 0.0), "c000002": (0.3, 0.2), "c000003": (0.0, 0.9)})
    assert pick(bulging, "knee").id == "c000001", "without a knee, the better of the two ends"
    assert pick(state, "id:3").id == "c000003"
    assert pick(state, "id:c000001").id == "c000001"
    assert pick(state, "c000001").id == "c000001"
    with pytest.raises(JournalError, match=r"no candidate 'worst' in this run; expected best, knee or an id"):
        pick(state, "worst")


def test_before_the_finals_the_best_on_search_leads() -> None:
    state = state_of({"c000001": (1.0, 0.0), "c000002": (0.8, 0.7)})
    assert leader(state) == "c000002"
    assert headline(state, summarize(state, no_items)["details"]["search"])[0] == ["c000002"]
    assert leader(RunState()) is None


def no_items(name: str, split: Split) -> Evaluation:
    raise AssertionError(f"nobody asked for the items of {name} on {split}")


def test_tasks_on_which_all_baselines_score_the_same_are_found() -> None:
    names = ("f", "g", "cost.layers")
    events = [
        event(
            "run", version=1, objectives=[{"name": name, "direction": "maximize", "reference": None} for name in names]
        )
    ]
    for name, score in (("source:a", 0.2), ("source:b", 0.3), ("uniform", None)):
        events.append(event("baseline", id=name, recipe=None, values=None))
        events.append(
            event(
                "evaluated", id=name, split="search", status="failed" if score is None else "ok",
                scores={} if score is None else {"f": score, "g": 0.0}, stderr={}, cost={"layers": 4.0},
                error=None, row=None, checksum=None, elapsed_s=1.0,
            )
        )  # fmt: skip
    assert indifferent(RunState.of(events)) == {"g": 0.0}
    assert indifferent(RunState.of(events[:3])) == {}


def test_costs_are_left_out_of_the_mean_and_take_the_worst_baseline_as_reference() -> None:
    objectives = (Objective("f"), Objective("cost.tokens", Direction.MINIMIZE))
    evaluation = Evaluation("a", Split.SEARCH, Status.OK, scores={"f": 0.5}, cost={"tokens": 1e6})
    assert utility(objectives, evaluation) == 0.5
    assert utility(objectives[1:], evaluation) == -1e6
    goals = [{"name": item.name, "direction": item.direction.value, "reference": None} for item in objectives]
    events = [event("run", version=1, objectives=goals)]
    for name, tokens in (("source:a", 50.0), ("source:b", 70.0)):
        events.append(event("baseline", id=name, recipe=None, values=None))
        events.append(
            event(
                "evaluated", id=name, split="search", status="ok", scores={"f": 0.5}, stderr={}, cost={"tokens": tokens},
                error=None, row=None, checksum=None, elapsed_s=1.0,
            )
        )  # fmt: skip
    state = RunState.of(events)
    assert reference_losses(state) == [0.0, 70.0]
    assert front_json(state, front_of(state))["hypervolume"] == pytest.approx(0.5 * 20)


def test_weights_apply_to_the_mean() -> None:
    objectives = (
        Objective("f", weight=3.0),
        Objective("g"),
        Objective("h", weight=0.0),
        Objective("cost.tokens", Direction.MINIMIZE, weight=0.1),
    )
    items = {"f": np.float32([0, 1]), "g": np.float32([1, 1]), "h": np.float32([0, 9])}
    one = Evaluation("a", Split.REPORT, Status.OK, scores={"f": 0.5, "g": 1.0, "h": 4.5}, stderr={"f": 0.5, "g": 0.0, "h": 1.0},
                     item_scores=items, cost={"tokens": 10.0})  # fmt: skip
    assert utility(objectives, one) == pytest.approx((1.5 + 1.0 - 1.0) / 4.1)
    assert mean_with_error(objectives, one) == pytest.approx(((1.5 + 1.0 - 1.0) / 4.1, 1.5 / 4.1))
    other = replace(one, scores={"f": 0.0, "g": 1.0, "h": 0.0}, cost={"tokens": 20.0},
                    item_scores=items | {"f": np.float32([0, 0]), "h": np.float32([0, 0])})  # fmt: skip
    difference, error = paired_difference(objectives, one, other)
    assert difference == pytest.approx(utility(objectives, one) - utility(objectives, other))
    assert error == pytest.approx(3.0 * 0.5 / 4.1)


def test_errors_of_a_ruined_model_stay_finite() -> None:
    """Word perplexities grow exponentially; the squares of their errors are too large for float64."""
    objectives = (Objective("f", Direction.MINIMIZE), Objective("g", Direction.MINIMIZE))
    ruined = Evaluation("a", Split.REPORT, Status.OK, scores={"f": 1e200, "g": 1e200}, stderr={"f": 3e200, "g": 4e200})
    assert mean_with_error(objectives, ruined) == pytest.approx((-1e200, 2.5e200))


@pytest.mark.parametrize(("weight", "of_cost"), [(None, 0.0), (2.0, 0.0), (0.0, 1.0)])
def test_a_cost_counts_in_the_mean_only_if_nothing_else_does(weight: float | None, of_cost: float) -> None:
    objectives = (Objective("f", weight=weight), Objective("cost.tokens", Direction.MINIMIZE))
    assert weights_in_mean(objectives)[1] == of_cost
    assert sum(weights_in_mean(objectives)) > 0


def test_paired_differences_use_the_same_items() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.random(4000)
    items = {name: (difficulty < level).astype(np.float32) for name, level in (("good", 0.62), ("bad", 0.60))}
    good, bad = (Evaluation(name, Split.REPORT, Status.OK, item_scores={"t": items[name]}) for name in ("good", "bad"))
    difference, error = paired_difference((Objective("t"),), good, bad)
    assert difference == pytest.approx(items["good"].mean() - items["bad"].mean(), abs=1e-6)
    unpaired = np.sqrt((items["good"].var() + items["bad"].var()) / 4000)
    assert error < unpaired / 3, "items that both solve or both miss should not add to the error of the difference"
    assert paired_difference((Objective("t", Direction.MINIMIZE),), good, bad)[0] == -difference


def test_the_paired_error_of_a_group_is_computed_per_task() -> None:
    """The two models differ by very different amounts on the four tasks: that adds no uncertainty to the mean over all items."""
    rng = np.random.default_rng(2)
    gains, sizes = (0.5, 0.2, -0.1, 0.0), (100, 100, 100, 100)
    differences, errors = [], []
    for _ in range(200):
        bad = np.concatenate([rng.random(size) < 0.4 for size in sizes]).astype(np.float32)
        good = np.concatenate([rng.random(n) < 0.4 + gain for n, gain in zip(sizes, gains, strict=True)])
        first, second = (
            Evaluation("x", Split.REPORT, Status.OK, item_scores={"g": items}, sample_sizes={"g": sizes})
            for items in (good.astype(np.float32), bad)
        )
        difference, error = paired_difference((Objective("g"),), first, second)
        differences.append(difference)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.1)


def test_a_hypervolume_that_overflows_is_none() -> None:
    """Three perplexities of a ruined baseline: the front could not be written, so the run could neither continue nor be resumed."""
    names = ("f", "g", "h")
    goals = [{"name": name, "direction": "minimize", "reference": 1e120} for name in names]
    shared = {"split": "search", "status": "ok", "stderr": {}, "cost": {}, "error": None, "row": None, "checksum": None}
    events = [
        event("run", version=1, objectives=goals),
        event("baseline", id="uniform", values=[0.5], recipe=None),
        event("evaluated", id="uniform", scores=dict.fromkeys(names, 5.0), elapsed_s=1.0, **shared),
    ]
    state = RunState.of(events)
    assert front_json(state, front_of(state))["hypervolume"] is None


@pytest.mark.filterwarnings("error")
def test_comparison_with_a_ruined_model_is_finite() -> None:
    """Perplexities of 1e50 do not fit into the item matrix's float32: the difference was NaN, and no summary could be written."""
    items = {"good": [5.0, 6.0, 7.0], "ruined": [1e50, 4e60, 6.0]}
    good, ruined = (
        Evaluation(name, Split.REPORT, Status.OK, item_scores={"ppl": _item_row(np.array(values))})
        for name, values in items.items()
    )
    difference, error = paired_difference((Objective("ppl", Direction.MINIMIZE),), good, ruined)
    assert 1e38 < difference < np.inf
    assert 1e38 < error < np.inf


def test_the_winner_is_compared_with_every_other_baseline_scored_on_report() -> None:
    goals = [{"name": name, "direction": "maximize", "reference": None} for name in ("f", "g")]
    items = {
        "best": ([1, 1, 1, 0], [1, 1, 0, 0]),
        "source:a": ([1, 0, 0, 0], [1, 0, 1, 0]),
        "source:b": ([0, 0, 0, 0], [0, 0, 0, 0]),
    }
    events = [event("run", version=1, objectives=goals)]
    events += [event("baseline", id=name, recipe=None, values=None) for name in [*items, "failed", "not scored"]]
    for row, name in enumerate([*items, "failed"]):
        good = name in items
        scores = dict(zip("fg", map(float, np.mean(items[name], axis=1)), strict=True)) if good else {}
        events.append(
            event(
                "evaluated", id=name, split="report", status="ok" if good else "failed", scores=scores, stderr=dict.fromkeys(scores, 0.1),
                cost={}, error=None, row=row if good else None, checksum="00000000" if good else None, elapsed_s=1.0,
            )
        )  # fmt: skip
    state = RunState.of([*events, event("best", id="best")])

    def read(name: str, split: Split) -> Evaluation:
        columns = dict(zip("fg", (np.array(values, np.float32) for values in items[name]), strict=True))
        return replace(state.evaluations[name, split], item_scores=columns)

    found = summarize(state, read)["comparisons"]
    assert set(found) == {"source:a", "source:b"}
    # f: 0 1 1 0, g: 0 1 -1 0, each with its sample variance over four items; averaging two tasks halves the error
    error = np.sqrt((1 / 3) / 4 + (2 / 3) / 4) / 2
    assert found["source:a"]["difference"] == pytest.approx(0.25)
    assert found["source:a"]["low"] == pytest.approx(0.25 - 1.959964 * error)
    assert found["source:a"]["high"] == pytest.approx(0.25 + 1.959964 * error)
    assert (verdict(found["source:a"]), verdict(found["source:b"])) == ("no difference shown", "better")
    assert verdict({"low": -0.2, "high": -0.1}) == "worse"


def test_overhead_is_the_time_outside_the_engine_and_scoring() -> None:
    """Medians over the candidates that were timed, so that one that waited for a compiler does not count; asking time is spread over the candidates proposed."""
    goals = [{"name": "f", "direction": "maximize", "reference": None}]
    events = [event("run", version=1, objectives=goals)]
    events += [event("baseline", id=name, recipe=None, values=None) for name in ("source:a", "source:b")]
    events.append(event("asked", id="c000001", values=[0.5], parents=[], ask_s=0.5))
    for name, cost in (
        ("source:a", {"total_s": 2.0, "engine_s": 1.0, "score_s": 0.5, "merge_s": 0.25, "items": 4}),
        ("c000001", {"total_s": 4.0, "engine_s": 2.0, "score_s": 0.5, "merge_s": 0.75, "items": 4}),
        ("source:b", {"total_s": 9.0, "engine_s": 1.5, "score_s": 0.25, "merge_s": 7.0, "items": 4}),
    ):
        events.append(
            event(
                "evaluated", id=name, split="search", status="ok", scores={"f": 0.5}, stderr={}, cost=cost,
                error=None, row=None, checksum=None, elapsed_s=1.0,
            )
        )  # fmt: skip
    assert overhead(RunState.of(events)) == {
        "candidate_s": 4.5,
        "ask_s": 0.5,
        "engine_s": 1.5,
        "merge_s": 0.75,
        "score_s": 0.5,
        "share": pytest.approx(2.5 / 4.5),
        "slowest_candidate_s": 9.0,
    }
    assert overhead(state_of({"a": (0.5, 0.5)})) == {}


@pytest.mark.parametrize(("names", "n_items"), [(("f",), 1), (("cost.items",), 4)], ids=["one-item", "costs-alone"])
def test_without_an_interval_there_is_no_comparison(names: tuple[str, ...], n_items: int) -> None:
    """A search that took hours must not end in a division by zero."""
    goals = [{"name": name, "direction": "maximize", "reference": None} for name in names]
    events = [event("run", version=1, objectives=goals)]
    events += [event("baseline", id=name, recipe=None, values=None) for name in ("source:a", "source:b")]
    for row, name in enumerate(("source:a", "source:b")):
        events.append(
            event(
                "evaluated", id=name, split="report", status="ok", scores={"f": 0.5}, stderr={"f": 0.0}, cost={"items": n_items},
                error=None, row=row, checksum="00000000", elapsed_s=1.0,
            )
        )  # fmt: skip
    state = RunState.of([*events, event("best", id="source:a")])

    def read(name: str, split: Split) -> Evaluation:
        return replace(state.evaluations[name, split], item_scores={"f": np.full(n_items, 0.5, np.float32)})

    summary = summarize(state, read)
    assert summary["comparisons"] == {}
    json.dumps(summary, allow_nan=False)


def test_the_hypervolume_of_a_minimised_task_is_measured_from_the_worst_baseline() -> None:
    """Measured from a score of 0, which nothing can be below, every volume would be 0."""
    goals = [{"name": "f", "direction": "minimize", "reference": None}]
    events = [event("run", version=1, objectives=goals)]
    for name, score in (("source:a", 3.0), ("source:b", 5.0)):
        events.append(event("baseline", id=name, recipe=None, values=None))
        events.append(
            event(
                "evaluated", id=name, split="search", status="ok", scores={"f": score}, stderr={}, cost={"items": 1},
                error=None, row=None, checksum=None, elapsed_s=1.0,
            )
        )  # fmt: skip
    state = RunState.of(events)
    assert front_json(state, front_of(state))["hypervolume"] == pytest.approx(2.0)


def test_the_confidence_interval_of_a_mean_covers_the_truth() -> None:
    """95% intervals of the mean over two tasks cover the true mean in about 95% of draws."""
    rng = np.random.default_rng(1)
    objectives = (Objective("a"), Objective("b"))
    hits, draws = 0, 600
    for _ in range(draws):
        items = {"a": rng.random(300) < 0.7, "b": rng.random(300) < 0.4}
        scores = {name: float(values.mean()) for name, values in items.items()}
        stderr = {name: float(values.std(ddof=1) / np.sqrt(300)) for name, values in items.items()}
        mean, error = mean_with_error(
            objectives, Evaluation("x", Split.REPORT, Status.OK, scores=scores, stderr=stderr)
        )
        hits += abs(mean - 0.55) < 1.959964 * error
    assert 0.92 < hits / draws < 0.98


def test_tuned_task_arithmetic_is_the_one_best_on_search() -> None:
    details = {"uniform": {"mean": 0.9}, "task_arithmetic:0.3": {"mean": 0.5}, "task_arithmetic:0.8": {"mean": 0.6}}
    assert tuned_task_arithmetic(details) == "task_arithmetic:0.8"
    assert tuned_task_arithmetic({"uniform": {"mean": 0.9}}) is None


def test_repeated_finals_are_not_finished_until_they_end() -> None:
    state = state_of({"a": (0.5, 0.5), "b": (0.4, 0.4)})
    for step in (event("finalists", ids=["a"]), event("finished")):
        state.apply(step)
    assert state.finished
    state.apply(event("finalists", ids=["a", "b"]))
    assert not state.finished
