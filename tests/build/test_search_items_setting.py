"""A search with `evaluation.search_items`: candidates are scored on the drawn items, finals on all."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evomerge.build import make_problem, open_run, parse_config, start_search
from evomerge.build.commands.report import write_report
from evomerge.build.items import describe_items
from evomerge.cli import tables
from evomerge.core import Split
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search_items")
    for seed, model in enumerate(("a", "b")):
        write_tiny_llama(folder / model, seed=seed)
    write_toy_task(folder / "toy.yaml", n_items=302)
    return folder


def configured(folder: Path, **evaluation: Any) -> Any:
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": ["toy.yaml"],
        "engine": "transformers",
        "evaluation": evaluation,
        "cluster": {"kind": "local"},
        "strategy": "random",
        "budget": {"items": 65},
        "finals": {"finalists": 1},
    }
    return parse_config(settings, folder=folder)


def test_every_candidate_is_scored_on_the_drawn_items_only(folder: Path, tmp_path: Path) -> None:
    start_search(configured(folder, search_items=10), tmp_path / "run")
    run = open_run(tmp_path / "run")
    items = {(one.candidate_id, one.split): one.cost["items"] for one in run.state.evaluations.values()}
    searched = [count for (_, split), count in items.items() if split is Split.SEARCH]
    assert searched == [10] * 6
    assert {count for (_, split), count in items.items() if split is not Split.SEARCH} == {302}


def test_tables_show_the_number_of_items_behind_scores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(folder, search_items=10)
    start_search(config, tmp_path / "run")
    out, run = io.StringIO(), open_run(tmp_path / "run")
    monkeypatch.setattr(tables, "CONSOLE", Console(file=out, width=200))
    tables.print_summary(run)
    tables.print_front(run)
    shown = out.getvalue()
    assert "search split, 10 items," in shown
    assert "report split, 302 items," in shown
    assert "evaluations of 10 items)" in shown
    for split, said in ((Split.REPORT, False), (Split.SEARCH, True)):
        tables.print_evaluation("a", run.evaluation("source:a", split), config)
        assert ("evaluation.search_items is 10" in out.getvalue()) == said
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "10 items that guided the search" in page
    assert "302 items that the search never saw" in page
    assert "Search split, 10 items," in page


def test_validate_reports_how_many_of_the_items_are_drawn(folder: Path) -> None:
    lines = describe_items(make_problem(configured(folder, search_items=10)))
    assert lines[0].startswith("items       toy: 10 of 302 search, 302 select, 302 report;")
    assert not any("search_items" in line for line in lines)


def test_validate_advises_against_hundreds_of_items_for_each_candidate(folder: Path) -> None:
    lines = describe_items(make_problem(configured(folder)))
    assert lines[0].startswith("items       toy: 302 search, 302 select, 302 report;")
    assert "evaluation.search_items, e.g. 50" in lines[1]
