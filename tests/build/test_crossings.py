"""Searches that cross models: what is refused and what is planned."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from evomerge.build import describe, make_problem, parse_config
from evomerge.core import Candidate, ConfigError, CrossoverGenome, VectorGenome
from evomerge.search import Entry
from evomerge.testing.tiny_models import write_tiny_llama

TASK = Path(__file__).resolve().parents[2] / "tasks" / "reverse.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_tiny_llama(place / name, seed=seed)
    return place


def problem(folder: Path, **changes: Any) -> Any:
    settings = {
        "models": {"experts": {name: f"./{name}" for name in "abc"}},
        "tasks": [str(TASK)],
        "strategy": "m2n2",
        "budget": {"evaluations": 20},
        **changes,
    }
    return make_problem(parse_config(settings, folder=folder))


def test_a_short_configuration_is_enough(folder: Path) -> None:
    made = problem(folder)
    assert made.space.dimension == 3
    assert {item.id: item.values for item in made.baselines()} == {
        "source:a": (1.0, 0.0, 0.0),
        "source:b": (0.0, 1.0, 0.0),
        "source:c": (0.0, 0.0, 1.0),
        "uniform": None,
    }
    assert any("crossovers of 3 models" in line and "1 chromosome" in line for line in describe(made))


def test_module_groups_are_chromosomes(folder: Path) -> None:
    made = problem(folder, space={"module_groups": ["attention", "norms", "rest"]})
    names = [{name for name, _ in chromosome} for chromosome in made.crossings.layout.chromosomes]
    assert all("self_attn" in name for name in names[0])
    assert all("norm" in name for name in names[1])
    genomes = {name: VectorGenome(tuple(float(name == other) for other in "abc")) for name in "abc"}
    child = CrossoverGenome(("a", "b"), 0.25, (0.5, 0.0, 1.0))
    entries = {name: Entry(name, genome) for name, genome in (genomes | {"c1": child}).items()}
    recipe = made.recipe(Candidate("c1", child), entries)
    assert recipe.name == "c1"
    assert recipe.models() == tuple(str(folder / name) for name in "abc")
    assert set(recipe.pieces.tensors) == set().union(*names)
    norm = recipe.pieces.tensors["model.norm.weight"][0].row
    head = recipe.pieces.tensors["model.embed_tokens.weight"][0].row
    assert recipe.pieces.rows[norm][0] < recipe.pieces.rows[norm][1], (
        "right of its split, expected three quarters of the second parent"
    )
    assert recipe.pieces.rows[head][0] > recipe.pieces.rows[head][1], (
        "left of its split, expected a quarter of the second parent"
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"space": {"method": "ties"}}, "space.method"),
        ({"space": {"layer_groups": 2}}, "space.layer_groups"),
        ({"space": {"stacking": {}}}, "space.stacking: strategy m2n2 crosses whole models"),
        ({"space": {"fixed": {"normalize": False}}}, "space.fixed"),
        ({"space": {"module_groups": ["attention"]}}, "rest"),
        ({"space": {"module_groups": ["attention", "tails", "rest"]}}, "tails"),
        ({"space": {"crossover": {"split": "layer"}}}, "split"),
        ({"strategy": {"name": "m2n2", "chromosomes": 2}}, "module_groups"),
        ({"strategy": {"name": "m2n2", "on": "layers"}}, "weights"),
        ({"models": {"experts": {"a": "./a"}}}, "at least two"),
        ({"models": None, "tasks": [], "evaluation": {"kind": "synthetic"}}, "on: recipes"),
    ],
)
def test_settings_that_do_not_fit_crossovers_are_refused(folder: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        problem(folder, **changes)


def test_on_recipes_the_space_is_that_of_the_method(folder: Path) -> None:
    made = problem(
        folder,
        models={"base": "./base", "experts": {"a": "./a", "b": "./b"}},
        space={"method": "ties"},
        strategy={"name": "m2n2", "on": "recipes"},
    )
    assert made.crossings is None
    assert made.space.dimension == 4


@pytest.mark.parametrize("strategy", ["m2n2", "random"])
def test_module_groups_work_for_models_with_other_tensor_names(tmp_path: Path, strategy: str) -> None:
    """As in GPT-NeoX; a group that the models lack is refused, and the error lists those they have."""
    for seed, name in enumerate("abc"):
        path = write_tiny_llama(tmp_path / name, seed=seed) / "model.safetensors"
        tensors = {name.replace("self_attn", "attention"): tensor for name, tensor in load_file(path).items()}
        save_file({name.replace("mlp.", "mixer."): tensor for name, tensor in tensors.items()}, path)
    method = {} if strategy == "m2n2" else {"method": "linear"}
    made = problem(tmp_path, space={"module_groups": ["attention", "rest"], **method}, strategy=strategy)
    if made.crossings is not None:
        assert all("attention." in name for name, _ in made.crossings.layout.chromosomes[0])
    else:
        weight = (
            made.template.recipe(made.space.decode([0.5] * made.space.dimension))
            .slices[0]
            .sources[0]
            .parameters["weight"]
        )
        assert [setting.filter for setting in weight] == ["attention.", None]
    with pytest.raises(ConfigError, match=r"are left for 'mlp'.*the models have attention, embeddings, norms"):
        problem(tmp_path, space={"module_groups": ["mlp", "rest"], **method}, strategy=strategy)
