"""A search that starts from, and is compared with, one of the user's own recipes: in tables and finals, and unchanged on resume."""

from pathlib import Path

import pytest
import yaml

import evomerge
from evomerge.core import ConfigError
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task

RECIPE = """\
merge_method: task_arithmetic
base_model: base
models: [{model: b, parameters: {weight: 0.25}}, {model: a, parameters: {weight: %s}}]
dtype: bfloat16
"""


def test_a_users_recipe_is_searched_from_compared_and_checked_on_resume(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    (tmp_path / "mine.yml").write_text(RECIPE % 0.75)
    settings = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "tasks": ["toy.yaml"],
        "baselines": {"recipes": ["mine.yml"], "task_arithmetic": []},
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local", "workers": 1},
        "budget": {"evaluations": 8},
        "finals": {"finalists": 1},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    state = evomerge.run_search(evomerge.load_config(tmp_path / "search.yaml"), run)
    (mine,) = [entry for entry in state.baselines if entry.id == "recipe:mine"]
    assert mine.genome.values == pytest.approx((0.5, 0.25 / 1.5))  # weights in [0, 1.5]
    summary = evomerge.open_run(run).summary()
    assert "recipe:mine" in summary["details"]["report"]
    assert "recipe:mine" in summary["comparisons"] or summary["best_id"] == "recipe:mine"
    assert evomerge.open_run(run).recipe(mine).dtype == "bfloat16"

    (tmp_path / "mine.yml").write_text(RECIPE % 0.5)
    with pytest.raises(ConfigError, match="changed since the run was started: baselines recipe:mine"):
        evomerge.resume_search(run, overrides=["budget.evaluations=9"])
    (tmp_path / "mine.yml").write_text(RECIPE % 0.75)
    assert len(evomerge.resume_search(run, overrides=["budget.evaluations=9"]).entries) == 9
