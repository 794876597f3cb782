"""A run can be read when its models are gone: its recipes are exported from what it recorded, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.build import export_recipe, open_run, parse_config, resume_search, start_search
from evomerge.build.commands.report import write_report
from evomerge.core import CheckpointError, ConfigError, CrossoverGenome
from evomerge.search.journal import Journal, read_journal
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task

SPACES: dict[str, dict[str, Any]] = {
    "ties": {"method": "ties", "space": {"layer_groups": 2, "module_groups": ["attention", "rest"]}, "strategy": "random"},
    "stacks": {"space": {"stacking": {"max_depth": 4}}, "strategy": "ga"},
    "niches": {"space": {"module_groups": ["attention", "rest"]}, "strategy": {"name": "m2n2", "population_size": 3}},
    "niches by segment": {
        "space": {"crossover": {"angle": "segment"}},
        "strategy": {"name": "m2n2", "population_size": 3, "mutation_sigma": 0.01},
    },
}  # fmt: skip


def search(folder: Path, name: str, **changes: Any) -> Path:
    models = folder / "models"
    for seed, model in enumerate(("base", "a", "b")):
        write_tiny_llama(models / model, seed=seed)
    write_toy_task(folder / "toy.yaml", n_items=4)
    settings = {
        "models": {"experts": {"a": "models/a", "b": "models/b"}},
        "tasks": ["toy.yaml"],
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local"},
        "budget": {"evaluations": 16},
        "finals": {"finalists": 2},
        **SPACES[name],
        **changes,
    }
    if "niches" not in name:
        settings["models"]["base"] = "models/base"
    start_search(parse_config(settings, folder=folder), folder / "run")
    return folder / "run"


def recipes(run: Path) -> dict[str, bytes]:
    """Id -> the content of the file that `evomerge export` writes."""
    names = list(open_run(run).state.entries)
    path = run.parent / "recipe.yaml"
    return {name: export_recipe(run, f"id:{name}", path, overwrite=True)[2].read_bytes() for name in names}


def without_record(run: Path) -> None:
    """Turns a run into one of an older evomerge that recorded neither models nor factors."""
    (run / "models.json").unlink()
    events = [event for event in read_journal(run / "journal.jsonl") if event["event"] != "crossed"]
    (run / "journal.jsonl").unlink()
    Journal(run / "journal.jsonl").append(*events)


@pytest.mark.parametrize("name", SPACES)
def test_a_run_is_exported_and_reported_without_its_models(tmp_path: Path, name: str) -> None:
    run = search(tmp_path, name)
    report = write_report(run, tmp_path / "before.html").read_bytes()
    known = recipes(run)
    (tmp_path / "models").rename(tmp_path / "moved")
    assert recipes(run) == known
    assert export_recipe(run, "best", tmp_path / "best.yaml")[2].read_bytes() == (run / "best.yaml").read_bytes()
    (run / "best.yaml").unlink()
    assert write_report(run, tmp_path / "after.html").read_bytes() == report
    assert "merge_method" in report.decode() or "evomerge-recipe" in report.decode()

    without_record(run)
    with pytest.raises(
        CheckpointError, match=r"did not record enough .* put them back where they were: .*no such model folder"
    ):
        recipes(run)
    (tmp_path / "moved").rename(tmp_path / "models")
    assert recipes(run) == known, "recipes made from the models differ from the recorded ones"


def test_a_resumed_run_records_what_an_older_version_did_not(tmp_path: Path) -> None:
    run = search(tmp_path, "niches", budget={"evaluations": 8}, finals={"finalists": 0})
    without_record(run)
    resume_search(run, overrides=["budget.evaluations=14"])
    (tmp_path / "models").rename(tmp_path / "moved")
    with pytest.raises(
        ConfigError,
        match=r"no such model folder(.|\n)*put them back to continue \(symbolic links work too: ln -s NEW OLD\)",
    ):
        resume_search(run, overrides=["budget.evaluations=15"])
    state = open_run(run).state
    assert any(isinstance(entry.genome, CrossoverGenome) and entry.factors is None for entry in state.proposed)
    assert export_recipe(run, "id:source:a", tmp_path / "a.yaml")[0] == "source:a"
    (tmp_path / "moved").rename(tmp_path / "models")
    assert len(recipes(run)) == 14


def test_an_invalid_record_of_the_models_is_reported(tmp_path: Path) -> None:
    run = search(tmp_path, "ties")
    record = json.loads((run / "models.json").read_text())
    for key in record:
        record[key]["tensors"][0][1] = "F33"
    for content in (json.dumps(record), "[]", "{"):
        (run / "models.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"models\.json"):
            export_recipe(run, "best", tmp_path / "best.yaml")
