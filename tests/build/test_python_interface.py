"""The Python interface as used in a notebook: settings without a file, a table of all evaluations, recipes as objects."""

import json
from pathlib import Path

import pytest

import evomerge
from evomerge.build.commands.scoring import evaluate_model, identity_recipe
from evomerge.core import ConfigError, EvaluationError, JournalError, Split, VectorGenome
from evomerge.recipe import read_recipe
from evomerge.strategy.base import Proposal
from evomerge.strategy.space_filling import RandomSearch
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task

SETTINGS = {
    "strategy": "random",
    "evaluation": {"kind": "synthetic", "function": "zdt1", "dimension": 3, "n_items": 5, "failure_rate": 0.2},
    "cluster": {"kind": "local"},
    "budget": {"evaluations": 12},
    "finals": {"finalists": 2},
}


def test_settings_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"models": {"experts": {"a": Path("a"), "b": "/b"}}, "tasks": "t.yaml", "budget": {"evaluations": 9}}
    config = evomerge.load_config(settings, {"budget.evaluations": 7, "tasks.0.splits": {"search": "train[:50%]"}})
    assert config.models is not None
    assert [model.path for model in config.models.experts.values()] == [str(tmp_path / "a"), "/b"]
    assert (config.budget.evaluations, config.tasks[0].splits) == (7, {"search": "train[:50%]"})
    moved = evomerge.load_config(settings, {"models.experts.b.path": Path("/c")}).models
    assert moved is not None
    assert moved.experts["b"].path == "/c"
    with pytest.raises(ConfigError, match="bugdet: unknown key"):
        evomerge.load_config({**settings, "bugdet": 1})


def test_a_run_can_be_read_as_a_table(tmp_path: Path) -> None:
    evomerge.run_search(evomerge.load_config(SETTINGS), tmp_path / "run")
    run = evomerge.open_run(tmp_path / "run")
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, 12 evaluations)"
    rows = run.records()
    assert len(rows) == len(run.state.evaluations)
    assert sum(row["split"] == "search" for row in rows) == 12
    good = next(row for row in rows if row["status"] == "ok")
    evaluation = run.evaluation(str(good["id"]), Split(str(good["split"])))
    assert good["f1"] == evaluation.scores["f1"]
    assert good["f1_stderr"] == evaluation.stderr["f1"]
    assert good["cost.items"] == evaluation.cost["items"]
    assert {"x0", "x1", "x2"} <= good.keys()
    assert {row["status"] for row in rows} == {"ok", "failed"}
    assert all(row["error"] for row in rows if row["status"] == "failed")
    assert run.recipe("best") is None
    with pytest.raises(JournalError, match="'c000099' has not been evaluated on the search split"):
        run.evaluation("c000099")
    with pytest.raises(JournalError, match="no candidate 'c000099'"):
        run.recipe("c000099")


def test_a_file_or_settings_can_be_given_as_configuration(tmp_path: Path) -> None:
    state = evomerge.run_search(SETTINGS, tmp_path / "run")
    assert repr(state) == "RunState(12 evaluations, finished)"
    (tmp_path / "search.yaml").write_text(json.dumps(SETTINGS))
    again = evomerge.run_search(tmp_path / "search.yaml", tmp_path / "again")
    assert [entry.genome for entry in again.proposed] == [entry.genome for entry in state.proposed]
    for overrides in ("budget.evaluations=14", {"budget.evaluations": 16}):
        state = evomerge.resume_search(tmp_path / "run", overrides=overrides)
    assert state.n_evaluations[Split.SEARCH] == 16
    with pytest.raises(ConfigError, match="--set seed=1: only budget, cluster, finals can be changed"):
        evomerge.resume_search(tmp_path / "run", overrides="seed=1")
    with pytest.raises(ConfigError, match="expected a configuration file or a mapping of settings, got int"):
        evomerge.run_search(3, tmp_path / "other")  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="unknown split 'final'; known: search, select, report"):
        evomerge.open_run(tmp_path / "run").evaluation("c000001", "final")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ((1.7, 0.5, 0.5), "c000003, which is invalid: every coordinate"),
        ((0.5,), r"c000003.*shape \(3,\), got \(1,\)"),
    ],
)
def test_an_invalid_proposal_is_refused_before_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: tuple[float, ...], message: str
) -> None:
    """So that the run can be resumed once the strategy is fixed."""
    with monkeypatch.context() as patch:
        original = RandomSearch._propose

        def propose(self: RandomSearch) -> Proposal:
            return Proposal(VectorGenome(point)) if self._next_id == "c000003" else original(self)

        patch.setattr(RandomSearch, "_propose", propose)
        with pytest.raises(ConfigError, match=f"strategy random proposed {message}"):
            evomerge.run_search(SETTINGS, tmp_path / "run")
    state = evomerge.resume_search(tmp_path / "run")
    assert state.n_evaluations[Split.SEARCH] == 12


def test_recipes_can_be_passed_as_objects(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "a", seed=0)
    recipe = identity_recipe(tmp_path / "a")
    out = evomerge.merge_recipe(recipe, tmp_path / "out")
    assert read_recipe(out / "recipe.yaml") == recipe
    with pytest.raises(ConfigError, match="scores points, not models"):
        evaluate_model(evomerge.load_config(SETTINGS), recipe, "search")
    with pytest.raises(ConfigError, match="no such model folder or recipe file: org/nowhere"):
        evaluate_model(SETTINGS, "org/nowhere")


def test_the_tasks_of_a_run_score_a_model_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "a", seed=0)
    write_tiny_llama(tmp_path / "hub" / "models--org--tiny" / "snapshots" / "1", seed=0)
    (tmp_path / "hub" / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    settings = {
        "models": {"base": "a", "experts": {"b": "a"}},
        "tasks": ["toy.yaml"],
        "engine": "transformers",
        "cluster": {"kind": "local"},
        "budget": {"evaluations": 6},
        "finals": {"finalists": 0},
    }
    evomerge.run_search(settings, tmp_path / "run")
    scored = evaluate_model(tmp_path / "run", "org/tiny", "search", overrides="tasks.0.limit=3")
    assert len(scored.evaluation.item_scores["toy"]) == 3
    assert scored.config.tasks[0].limit == 3
    assert scored.model == scored.evaluation.candidate_id == str(tmp_path / "hub/models--org--tiny/snapshots/1")


def test_names_are_listed_and_loaded() -> None:
    assert all(getattr(evomerge, name) is not None for name in dir(evomerge))
    assert evomerge.__version__[0].isdecimal()
