"""`strategy: auto` becomes what docs/strategies.md advises, says so, and stays it."""

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.build import describe, make_problem, parse_config, resume_search, start_search
from evomerge.build.strategies import chosen_strategy


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
    [("sphere", 5, "cma_es"), ("zdt1", 8, "map"), ("zdt1", 20, "map"), ("zdt1", 21, "nsga2")],
)
def test_auto_follows_the_guide(function: str, dimension: int, expected: str) -> None:
    found = problem(function, dimension)
    assert chosen_strategy(found).name == expected
    assert describe(found)[0].startswith(f"strategy    {expected} (auto: ")


def test_a_run_keeps_what_auto_became(tmp_path: Path) -> None:
    start_search(problem("sphere", 3).config, tmp_path / "run")
    resume_search(tmp_path / "run", overrides=["budget.evaluations=15"])
    first = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0][9:])
    assert first["strategy"] == "cma_es"


def test_options_are_those_of_the_chosen_strategy() -> None:
    assert chosen_strategy(problem("sphere", 3, strategy={"name": "auto", "sigma0": 0.3})).name == "cma_es"
    with pytest.raises(Exception, match="map has no option 'sigma0'"):
        problem("zdt1", 3, strategy={"name": "auto", "sigma0": 0.3})


@pytest.mark.parametrize(
    ("strategy", "objectives", "noted"),
    [
        ("cma_es", ["f1", "cost.generated_tokens"], True),
        ("ga", ["f1", "cost.layers"], True),
        ({"name": "cma_es", "weights": {"f1": 1, "cost.layers": 0.01}}, ["f1", "cost.layers"], False),
        ("cma_es", ["f1"], False),
        ("cma_es", ["cost.layers"], False),
        ("auto", ["f1", "cost.layers"], False),
    ],
)
def test_a_mean_of_scores_and_costs_is_noted(strategy: Any, objectives: list[str], noted: bool) -> None:
    lines = describe(problem("sphere", 3, strategy=strategy, objectives=objectives))
    assert any("may outweigh scores" in line for line in lines) == noted
