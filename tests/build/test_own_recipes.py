"""The user's recipes as baselines: located in the space if they lie in it, refused if the search cannot hold them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.build import describe, make_problem, parse_config
from evomerge.core import ConfigError
from evomerge.plan import make_plan
from evomerge.recipe import METHODS, write_recipe
from evomerge.testing.tiny_models import write_tiny_llama

TASK = Path(__file__).resolve().parents[2] / "tasks" / "reverse.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(place / name, seed=seed, n_layers=4)
    return place


def problem(
    folder: Path, method: str | None = "ties", experts: str = "ab", recipes: tuple[str, ...] = (), **space: Any
) -> Any:
    settings = {
        "models": {"base": "./base", "experts": {name: f"./{name}" for name in experts}},
        "space": ({} if method is None else {"method": method}) | space,
        "tasks": [str(TASK)],
        "budget": {"evaluations": 50},
        "baselines": {"recipes": list(recipes)},
    }
    return make_problem(parse_config(settings, folder=folder))


def written(folder: Path, text: str, name: str = "mine.yml") -> str:
    (folder / name).write_text(text)
    return name


SEARCHED = [spec for spec in METHODS.values() if any(parameter.search_default for parameter in spec.parameters)]


GROUPS: list[dict[str, Any]] = [
    {},
    {"layer_groups": 2, "module_groups": ["attention", "rest"]},
    {"layer_groups": 3, "module_groups": ["embeddings", "rest"]},
    {"layer_groups": 3, "module_groups": ["attention", "embeddings", "rest"], "smooth": True},
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("spec", SEARCHED, ids=lambda spec: spec.name)
def test_every_point_of_a_space_is_found_again(folder, spec, groups):
    experts = "a" if spec.max_sources == 1 else "ab"
    plain = problem(folder, spec.name, experts, **groups)
    point = np.random.default_rng(1).uniform(0.3, 0.6, plain.space.dimension)
    recipe = plain.template.recipe(plain.space.decode(point))
    write_recipe(recipe, folder / "point.yml")
    found = problem(folder, spec.name, experts, ("point.yml",), **groups)
    (baseline,) = [item for item in found.baselines() if item.id == "recipe:point"]
    assert baseline.values == pytest.approx(point, abs=1e-12)
    assert baseline.recipe == {**recipe.to_json(), "name": baseline.recipe["name"]}
    assert not any("outside the search space" in line for line in describe(found))


@pytest.mark.parametrize("bounds", [(0.0, 1.5), (-1000.0, 1000.0), (1000.0, 1001.0)])
@pytest.mark.parametrize("seed", range(5))
def test_values_at_the_bounds_of_gradients_are_found_again(folder, bounds, seed):
    space = {"layer_groups": 3, "smooth": True, "parameters": {"weight": {"low": bounds[0], "high": bounds[1]}}}
    plain = problem(folder, "task_arithmetic", **space)
    choices = [0.0, 0.5, 1.0] if bounds[0] == 0 else [0.0, 1.0]
    point = np.random.default_rng(seed).choice(choices, plain.space.dimension)
    write_recipe(plain.template.recipe(plain.space.decode(point)), folder / "corner.yml")
    found = problem(folder, "task_arithmetic", recipes=("corner.yml",), **space)
    (baseline,) = [item for item in found.baselines() if item.id == "recipe:corner"]
    assert baseline.values == pytest.approx(point, abs=1e-9)


STACKINGS: list[dict[str, Any]] = [
    {"encoding": "indicator", "repeats": 2},
    {"encoding": "indicator", "scales": "matrix"},
    {"encoding": "categorical", "models": ["a", "base"], "fixed_first": 0},
    {"encoding": "moves", "max_depth": 8},
    {"encoding": "swap", "scales": "none"},
    {"encoding": "categorical", "parameters": True, "models": ["a", "merged"]},
    {"encoding": "swap", "parameters": True, "models": ["a", "b", "merged"], "ends": "a"},
]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("stacking", STACKINGS)
def test_a_stack_is_a_starting_point_among_stacks(folder, stacking, method):
    merge = {"layer_groups": 2, "fixed": {"normalize": False}} if "parameters" in stacking else {}
    space = {"method": method if merge else None, "stacking": stacking, **merge}
    plain = problem(folder, **space)
    points = np.random.default_rng(1).uniform(0.05, 0.95, (5, plain.space.dimension))
    recipes = [plain.template.recipe(plain.space.decode(point)) for point in points]
    files = tuple(f"stack{number}.yml" for number in range(len(recipes)))
    for file, recipe in zip(files, recipes, strict=True):
        write_recipe(recipe, folder / file)
    found = problem(folder, recipes=files, **space)
    starts = [item.values for item in found.baselines() if item.id.startswith("recipe:")]
    for recipe, start in zip(recipes, starts, strict=True):
        again = found.template.recipe(found.space.decode(start))
        assert weights_of(again, found) == pytest.approx(weights_of(recipe, found), rel=1e-9, abs=1e-12)
    assert not any("outside the search space" in line for line in describe(found))


def weights_of(recipe: Any, found: Any) -> dict[Any, float]:
    """(Output, input) of a stack's plan -> coefficient."""
    return {
        (step.output, entry.key): next(iter(entry.parameters.values()), 1.0)
        for step in make_plan(recipe, found.headers).steps
        for entry in step.inputs
    }


FRANKEN = """\
merge_method: passthrough
slices:
  - sources: [{{model: a, layer_range: [0, 3]}}]
  - sources: [{{model: {middle}, layer_range: [1, 3]}}]
  - sources: [{{model: a, layer_range: [3, 4]{scale}}}]
"""


@pytest.mark.parametrize(
    ("middle", "scale", "is_found"),
    [
        ("b", "", True),
        ("base", "", False),
        (
            "b",
            ", parameters: {scale: [{filter: o_proj, value: 0.8}, {filter: down_proj, value: 0.8}, {value: 1}]}",
            True,
        ),
        ("b", ", parameters: {scale: [{filter: o_proj, value: 0.8}, {value: 1}]}", False),
        ("b", ", parameters: {scale: [{filter: o_proj, value: 9}, {filter: down_proj, value: 9}, {value: 1}]}", False),
        ("b", ", parameters: {scale: 0.8}", False),
        (
            "b",
            ", parameters: {scale: [{filter: o_proj, value: 1e-320}, {filter: down_proj, value: 1e-320}, {value: 1}]}",
            False,
        ),
    ],
)
def test_a_passthrough_of_layers_is_a_starting_point_among_stacks(folder, middle, scale, is_found):
    mine = written(folder, FRANKEN.format(middle=middle, scale=scale))
    found = problem(folder, None, recipes=(mine,), stacking={"encoding": "indicator", "repeats": 2})
    (baseline,) = [item for item in found.baselines() if item.id == "recipe:mine"]
    assert (baseline.values is not None) is is_found
    if is_found:
        path = found.template.path(found.space.decode(baseline.values))
        assert [f"{step.model}{step.layer}" for step in path] == ["a0", "a1", "a2", "b1", "b2", "a3"]
        assert path[-1].scale == pytest.approx(1 / 0.8 if scale else 1.0)


def test_a_merge_is_a_starting_point_among_stacks_with_it(folder):
    weights = "models: [{model: b, parameters: {weight: 0.75}}, {model: a, parameters: {weight: 0.5}}]"
    mine = written(folder, f"merge_method: linear\nparameters: {{normalize: false}}\n{weights}\n")
    space = {"stacking": {"parameters": True, "encoding": "swap"}, "layer_groups": 2, "fixed": {"normalize": False}}
    found = problem(folder, "linear", recipes=(mine,), **space)
    (baseline,) = [item for item in found.baselines() if item.id == "recipe:mine"]
    values = found.space.decode(baseline.values)
    for layers in ("0-1", "2-3"):
        assert (values[f"weight[a,{layers}]"], values[f"weight[b,{layers}]"]) == pytest.approx((0.5, 0.75))
    assert {step.layer: step.model for step in found.template.path(values)} == dict.fromkeys(range(4), "merged")


MERGEKIT = """\
merge_method: ties
base_model: {folder}/base
models:
  - {{model: {folder}/b, parameters: {{weight: 0.5, density: 0.3}}}}
  - {{model: ./a, parameters: {{weight: 0.25, density: 0.75}}}}
parameters: {{normalize: {normalize}, int8_mask: true}}
dtype: bfloat16
"""


def test_a_mergekit_file_is_a_starting_point_in_any_order_and_dtype(folder):
    mine = written(folder, MERGEKIT.format(folder=folder, normalize="false"))
    made = problem(folder, recipes=(mine,), fixed={"normalize": False})
    (baseline,) = [item for item in made.baselines() if item.id == "recipe:mine"]
    values = made.space.decode(baseline.values)
    assert values == pytest.approx({"weight[a]": 0.25, "weight[b]": 0.5, "density[a]": 0.75, "density[b]": 0.3})
    assert baseline.recipe["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("text", "space"),
    [
        (MERGEKIT.replace("{normalize}", "true"), {"fixed": {"normalize": False}}),
        (MERGEKIT.replace("{normalize}", "false"), {"method": "dare_ties", "fixed": {"normalize": False}}),
        (MERGEKIT.replace("{normalize}", "false").replace("0.75", "[0.75, 0.8]"), {"fixed": {"normalize": False}}),
        (
            MERGEKIT.replace("{normalize}", "false").replace("0.25", "9"),
            {"fixed": {"normalize": False}},
        ),
    ],
    ids=["another switch", "another method", "a gradient inside a group", "outside the bounds"],
)
def test_a_recipe_outside_the_space_is_compared_with_and_noted(folder, text, space):
    made = problem(folder, recipes=(written(folder, text.format(folder=folder)),), **space)
    (baseline,) = [item for item in made.baselines() if item.id == "recipe:mine"]
    assert baseline.values is None
    assert [line for line in describe(made) if "recipe:mine is outside the search space" in line]


def test_slices_along_the_layer_groups_are_a_point_of_the_space(folder):
    parts = "".join(
        f"  - sources: [{{model: base, layer_range: {layers}}}, {{model: a, layer_range: {layers}, parameters: {{density: {density}}}}}]\n"
        for layers, density in (("[0, 3]", 0.25), ("[3, 4]", 0.5))
    )
    text = f"merge_method: ties\nbase_model: base\nparameters: {{weight: 1, normalize: false}}\nslices:\n{parts}"
    groups = {"layer_groups": [[0, 3], [3, 4]], "fixed": {"normalize": False}}
    made = problem(folder, experts="a", recipes=(written(folder, text),), **groups)
    expected = {"weight[a,0-2]": 1.0, "weight[a,3-3]": 1.0, "density[a,0-2]": 0.25, "density[a,3-3]": 0.5}
    assert made.own_values == {"recipe:mine": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: tiez\nmodels: [{model: a}]\n", "mine.yml.*tiez"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]\n", "/c; add it to models, or change the recipe"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\ntokenizer_source: union\n", "tokenizer: recipes are scored with"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\nchat_template: chatml\n", "chat_template: recipes are scored with"),
        ("merge_method: passthrough\nslices:\n  - {sources: [{model: a, layer_range: [0, 3]}]}\n  - {sources: [{model: b, layer_range: [1, 4]}]}\n", "6 layers, but models of this search have 4"),
        ("merge_method: della\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1}\n", "della keeps ranks"),
        ("merge_method: sce\nbase_model: base\nmodels: [{model: a}]\nparameters: {select_topk: 0.5}\n", "sce keeps ranks"),
    ],
)  # fmt: skip
def test_recipes_the_search_cannot_hold_are_refused(folder, text, message):
    if "model: c" in text:
        write_tiny_llama(folder / "c", seed=9, n_layers=4)
    with pytest.raises(ConfigError, match=rf"baselines\.recipes: .*{message}"):
        problem(folder, recipes=(written(folder, text),))


def test_a_single_file_needs_no_list(folder):
    settings = {
        "models": {"experts": {"a": "a"}},
        "tasks": ["x"],
        "budget": {"hours": 1},
        "baselines": {"recipes": "m.yml"},
    }
    assert parse_config(settings, folder=folder).baselines.recipes == (str(folder / "m.yml"),)


def test_recipes_without_models_are_refused(folder):
    settings = {"evaluation": {"kind": "synthetic"}, "budget": {"hours": 1}, "baselines": {"recipes": "m.yml"}}
    with pytest.raises(ConfigError, match="uses neither models, tasks nor"):
        parse_config(settings, folder=folder)


def test_missing_files_and_files_of_the_same_name_are_refused(folder):
    with pytest.raises(ConfigError, match=r"baselines\.recipes: .*absent\.yml"):
        problem(folder, recipes=("absent.yml",))
    (folder / "sub").mkdir(exist_ok=True)
    text = yaml.safe_dump(
        {"merge_method": "linear", "models": [{"model": str(folder / "a")}], "parameters": {"weight": 1}}
    )
    written(folder, text, "sub/mine.yml")
    with pytest.raises(ConfigError, match="two files are called 'mine'"):
        problem(folder, recipes=(written(folder, text), "sub/mine.yml"))
