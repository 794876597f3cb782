"""The dtype that candidates and baselines of a search are rounded to: one dtype, named in every recipe."""

import pytest
from safetensors.torch import load_file, save_file

from evomerge.build import make_problem, parse_config
from evomerge.recipe import Recipe
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.mark.parametrize(("stored", "written"), [("bfloat16", "bfloat16"), ("float64", "float32")])
@pytest.mark.parametrize(
    "space", [{}, {"space": {"stacking": {}}}, {"strategy": {"name": "m2n2", "population_size": 2}}],
    ids=["merges", "stacks", "niches"],
)  # fmt: skip
def test_every_recipe_names_the_dtype_of_the_first_model(tmp_path, stored, written, space):
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, dtype="bfloat16" if name == "base" else "float32")
    if stored == "float64":
        file = tmp_path / "base" / "model.safetensors"
        save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    settings = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "tasks": ["toy.yaml"],
        "budget": {"evaluations": 20},
        **space,
    }
    problem = make_problem(parse_config(settings, folder=tmp_path))
    recipes = {item.id: Recipe.from_json(item.recipe) for item in problem.baselines()}
    assert {name: recipe.out_dtype for name, recipe in recipes.items()} == dict.fromkeys(recipes, written)
