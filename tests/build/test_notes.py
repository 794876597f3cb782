"""Notes on configurations that can be searched but are probably not what was meant."""

from pathlib import Path
from typing import Any

import pytest

from evomerge.build import describe, make_problem, parse_config
from evomerge.core import ConfigError
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(place / name, seed=seed)
    write_toy_task(place / "toy.yaml", n_items=4)
    return place


def notes(folder: Path, **changes: Any) -> str:
    settings = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "tasks": ["toy.yaml"],
        "strategy": "auto",
        "budget": {"evaluations": 20},
        **changes,
    }
    lines = describe(make_problem(parse_config(settings, folder=folder)))
    return "\n".join(line for line in lines if line.startswith("note"))


@pytest.mark.parametrize("order", ["oa", "ao"])
def test_stacks_of_two_vocabularies_are_refused_in_either_order(folder: Path, order: str) -> None:
    """A recipe may place another model between layers of one model, but in a search any layer may come last."""
    write_tiny_llama(folder / "deep", seed=8, n_layers=4)
    write_tiny_llama(folder / "o", seed=9, n_layers=6, vocab=144)
    stacking = {"models": {name: {"o": [1, 3], "a": None}[name] for name in order}, "ends": "a"}
    models = {"experts": {"a": "deep", "o": "o"}}
    with pytest.raises(ConfigError, match=r"144 embedding rows.* a search cannot"):
        notes(folder, models=models, space={"stacking": stacking})


@pytest.mark.parametrize(
    ("method", "noted"), [("ties", True), (["ties", "della"], True), (["ties", "linear"], False), ("linear", False)]
)
def test_an_expert_equal_to_the_base_is_noted_for_methods_that_weight_differences(
    folder: Path, method: Any, noted: bool
) -> None:
    models = {"base": "base", "experts": {"a": "a", "same": "base"}}
    assert ("models.experts.same: is the base itself" in notes(folder, models=models, method=method)) == noted


def test_depth_costs_are_noted_unless_layers_are_stacked(folder: Path) -> None:
    objectives = ["toy", "cost.layers", "cost.active_parameters", "cost.generated_tokens"]
    text = notes(folder, objectives=objectives)
    assert "cost.layers, cost.active_parameters are the same for every candidate unless layers are stacked" in text
    assert "the same for every" not in notes(folder, objectives=objectives, space={"stacking": {}})
    assert "the same for every" not in notes(folder, objectives=["toy", "cost.generated_tokens"])
