"""A search for every merge method that has something to search, in groups of layers and modules, with small models and the light engine."""

from pathlib import Path

import pytest
import yaml

import evomerge
from evomerge.config import SearchConfig
from evomerge.core import ConfigError, Split, Status
from evomerge.recipe import METHODS
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_tiny_llama(place / name, seed=seed, n_layers=4)
    write_toy_task(place / "toy.yaml", n_items=4)
    return place


def configuration(folder: Path, method: str) -> SearchConfig:
    n_experts = min(3, METHODS[method].max_sources or 3)
    settings = {
        "models": {"base": "base", "experts": {name: name for name in "abc"[:n_experts]}},
        "space": {"method": method, "layer_groups": 2, "module_groups": ["attention", "rest"]},
        "tasks": ["toy.yaml"],
        "strategy": "random",
        "baselines": {"sources": False, "task_arithmetic": []},
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local", "workers": 1},
        "budget": {"evaluations": 4},
        "finals": {"finalists": 1},
    }
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(settings))
    return evomerge.load_config(folder / f"{method}.yaml")


@pytest.mark.parametrize("spec", METHODS.values(), ids=lambda spec: spec.name)
def test_every_method_can_be_searched_and_merged(folder: Path, tmp_path: Path, spec) -> None:
    config = configuration(folder, spec.name)
    if not any(parameter.search_default for parameter in spec.parameters):
        with pytest.raises(ConfigError, match=rf"space: {spec.name} has no parameter that is searched by default"):
            evomerge.run_search(config, tmp_path / "run")
        return
    state = evomerge.run_search(config, tmp_path / "run")
    scored = [state.evaluations[name, Split.SEARCH].status for name in state.entries]
    assert scored == [Status.OK] * 4
    merged = evomerge.merge_recipe(tmp_path / "run" / "best.yaml", tmp_path / "merged")
    assert (merged / "model.safetensors").exists()
