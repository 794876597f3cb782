"""Items that appear in two splits: `validate --items`, a search and its journal report how many were left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.build import make_problem, open_run, parse_config, start_search
from evomerge.build.items import describe_items
from evomerge.cli.progress import Progress
from evomerge.core import EvaluationError, Split
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


def configured(folder: Path, **task: Any) -> Any:
    for seed, model in enumerate(("a", "b")):
        write_tiny_llama(folder / model, seed=seed)
    write_toy_task(folder / "toy.yaml", n_items=5)
    report = (folder / "toy.report.jsonl").read_text().splitlines()
    for split, count in (("search", 2), ("select", 1)):
        path = folder / f"toy.{split}.jsonl"
        path.write_text("\n".join([*report[:count], *path.read_text().splitlines()[count:]]) + "\n")
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": [{"task": "toy.yaml", **task}],
        "engine": "transformers",
        "cluster": {"kind": "local"},
        "strategy": "random",
        "budget": {"evaluations": 4},
        "finals": {"finalists": 1},
    }
    return parse_config(json.loads(json.dumps(settings)), folder=folder)


def test_shared_items_are_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"are also search items .* Set drop_shared: true to leave them out of"):
        describe_items(make_problem(configured(tmp_path)))


def test_the_number_of_items_left_out_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path, drop_shared=True)
    lines = describe_items(make_problem(config))
    assert lines[0].startswith("items       toy: 3 search, 4 select, 5 report")
    assert (
        lines[1]
        == "note        toy: 2 search, 1 select items also appear in a later split and were dropped (drop_shared)"
    )
    run = tmp_path / "run"
    start_search(config, run, observers=[Progress(run, 4)])
    told = capsys.readouterr().out
    assert told.count("note: 2 search items also appear in a later split and were dropped (drop_shared)") == 1
    assert told.count("note: 1 select items also appear in a later split") == 1
    evaluations = open_run(run).state.evaluations.values()
    dropped = {evaluation.split: evaluation.cost.get("dropped_items") for evaluation in evaluations}
    assert dropped == {Split.SEARCH: 2, Split.SELECT: 1, Split.REPORT: None}
