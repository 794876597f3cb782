"""From a genome to a recipe, and the baselines that a space contains exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.core import RecipeError, SpaceError
from evomerge.plan import make_plan, read_model_header
from evomerge.recipe import (
    MERGED,
    Folding,
    Recipe,
    RecipeTemplate,
    SearchedParameter,
    StackedModels,
    StackFrame,
    StackTemplate,
    Swap,
    default_searched,
    even_layer_groups,
    method_spec,
    recipe_to_yaml,
)
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool

N_LAYERS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for index, name in enumerate(("base", "a", "b")):
        write_tiny_llama(root / name, seed=index, n_layers=N_LAYERS)
    return {name: str(root / name) for name in ("base", "a", "b")}


def template(folders: dict[str, str], method: str = "task_arithmetic", **changes: Any) -> RecipeTemplate:
    axes = ("expert", "layer_group", "module_group")
    arguments: dict[str, Any] = {
        "method": method,
        "base": folders["base"],
        "experts": {name: folders[name] for name in ("a", "b")},
        "searched": default_searched(method_spec(method), axes),
        "fixed": {},
        "n_layers": N_LAYERS,
        "layer_groups": even_layer_groups(N_LAYERS, N_LAYERS),
        "module_groups": {"attention": ("attn.",), "mlp": ("mlp.",), "rest": ()},
        "out_dtype": "bfloat16",
        "seed": 1,
    }
    return RecipeTemplate(**{**arguments, **changes})


def merged(recipe: Recipe, folders: dict[str, str]) -> dict[str, torch.Tensor]:
    headers = {folder: read_model_header(folder) for folder in folders.values()}
    return {name: tensor.clone() for name, tensor in Merger(WeightPool(headers)).tensors(make_plan(recipe, headers))}


def check_same_merge(one: Recipe, other: Recipe, folders: dict[str, str], rtol: float = 2**-8) -> None:
    """Equal within one bfloat16 unit: theta_base + (theta - theta_base) may round differently from theta in float32."""
    got, wanted = merged(one, folders), merged(other, folders)
    for name in wanted:
        torch.testing.assert_close(got[name].float(), wanted[name].float(), rtol=rtol, atol=1e-6)


def test_parameters_of_an_expert_in_several_groups_form_a_family(folders: dict[str, str]) -> None:
    space = template(folders, "ties").space
    found = {parameter.name: parameter.family for parameter in space.parameters}
    assert found["weight[a,0-0,attention]"] == found["weight[a,2-2,rest]"] == "weight[a]"
    assert found["density[a,0-0,attention]"] == "density[a]"
    assert len(set(space.families)) == 4
    searched = [SearchedParameter("t", 0.0, 1.0, ("layer_group",))]
    assert template(folders, "slerp", experts={"a": folders["a"]}, searched=searched).space.families == (0, 0, 0)


def test_every_coordinate_changes_only_its_own_tensors(folders: dict[str, str]) -> None:
    made = template(folders)
    middle = dict.fromkeys((parameter.name for parameter in made.space.parameters), 0.5)
    before = merged(made.recipe(middle), folders)
    for parameter in made.space.parameters:
        after = merged(made.recipe({**middle, parameter.name: 1.2}), folders)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        layer, module = parameter.name.removesuffix("]").split(",")[1:]
        number = layer.split("-")[0]
        expected = {
            name
            for name in before
            if (f"layers.{number}." in name or (number == "0" and "embed" in name) or (number == str(N_LAYERS - 1) and name in ("model.norm.weight", "lm_head.weight")))
            and ("attention" if "self_attn" in name else "mlp" if "mlp" in name else "rest") == module
        }  # fmt: skip
        assert changed == expected, parameter.name


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_baselines_inside_the_space_are_reproduced_exactly(
    folders: dict[str, str], method: str, *, smooth: bool
) -> None:
    made = template(folders, method, smooth=smooth)
    weights = (0.3, 0.5, 1.0)
    recipes, points = made.baselines(weights), made.baseline_values(weights)
    assert {"source:a", "source:b"} <= set(points)
    assert ("uniform" in points) == (method in ("linear", "task_arithmetic"))
    for weight in weights:
        assert (f"task_arithmetic:{weight:g}" in points) == (method == "task_arithmetic")
    halves = f"{method}:0.5"
    assert (halves in points) == (halves in recipes) == (method != "linear")
    for name, values in points.items():
        check_same_merge(made.recipe(values), recipes[name], folders)


@pytest.mark.parametrize(
    ("method", "fixed"),
    [
        ("task_arithmetic", {"lambda": 0.5}),
        ("ties", {"density": 0.2}),
        ("dare_linear", {"density": 0.5, "rescale": False}),
        ("breadcrumbs", {"gamma": 0.02}),
        ("della", {"density": 1.0, "epsilon": 0.1}),
    ],
)
def test_baselines_are_points_only_if_the_fixed_parameters_allow_it(
    folders: dict[str, str], method: str, fixed: dict[str, float]
) -> None:
    weight = SearchedParameter("weight", 0.0, 1.5, ("expert",))
    made = template(folders, method, searched=[weight], fixed=fixed)
    recipes, points = made.baselines((0.3,)), made.baseline_values((0.3,))
    assert ("source:a" in points) == (fixed.get("lambda", 1.0) == fixed.get("density", 1.0) == 1.0)
    assert ("source:base" in points) == (not made.normalised)
    for name, values in points.items():
        check_same_merge(made.recipe(values), recipes[name], folders)


@pytest.mark.parametrize(
    ("searched", "fixed", "at"),
    [([], {"lambda": 0.5}, {}), ([SearchedParameter("lambda", 0.3, 2.0, ())], {}, {"lambda": 0.7}), ([], {}, {})],
)
def test_stack_of_all_merged_layers_equals_the_merge(
    folders: dict[str, str], searched: list[SearchedParameter], fixed: dict[str, float], at: dict[str, float]
) -> None:
    weight = SearchedParameter("weight", 0.0, 1.5, ("expert",))
    merge = template(folders, searched=[weight, *searched], fixed=fixed, layer_groups=[(0, N_LAYERS)], module_groups={})
    stack = stack_of_merged_layers(folders, merge)
    values = {"weight[a]": 0.6, "weight[b]": 0.2, **at}
    check_same_merge(stack.recipe(values), merge.recipe(values), folders, rtol=2**-7)


def test_stack_of_layers_with_interpolated_weights_equals_the_merge(folders: dict[str, str]) -> None:
    weight = SearchedParameter("weight", 0.0, 1.5, ("expert", "layer_group"))
    merge = template(folders, searched=[weight], layer_groups=[(0, 2), (2, 3)], smooth=True, module_groups={})
    stack = stack_of_merged_layers(folders, merge)
    values = {"weight[a,@0]": 0.6, "weight[a,@2]": 0.1, "weight[b,@0]": 0.2, "weight[b,@2]": 0.9}
    assert merge.weights(values, 1) == pytest.approx({"a": 0.35, "b": 0.55})
    check_same_merge(stack.recipe(values), merge.recipe(values), folders, rtol=2**-7)


def stack_of_merged_layers(folders: dict[str, str], merge: RecipeTemplate) -> StackTemplate:
    frame = StackFrame(
        {MERGED: tuple(range(N_LAYERS))}, MERGED, N_LAYERS, fixed_first=1, fixed_last=1,
        min_depth=N_LAYERS, max_depth=N_LAYERS, scale_low=1.0, scale_high=1.0,
    )  # fmt: skip
    return StackTemplate(
        models=StackedModels({name: folders[name] for name in "ab"}, folders["base"], dict.fromkeys(folders, N_LAYERS)),
        encoding=Swap(frame, scales=False),
        folding=Folding(("o_proj",), ("o_proj",)),
        merge=merge,
        plain=merge,
        out_dtype="bfloat16",
    )


def test_smooth_values_are_gradients_over_depth(folders: dict[str, str]) -> None:
    made = template(folders, "slerp", experts={"a": folders["a"]}, layer_groups=[(0, 2), (2, 3)], smooth=True)
    names = {"t[@0,attention]": 0.1, "t[@0,mlp]": 0.2, "t[@0,rest]": 0.3, "t[@2,attention]": 0.9, "t[@2,mlp]": 0.8, "t[@2,rest]": 0.7}  # fmt: skip
    assert [parameter.name for parameter in made.space.parameters] == list(names)
    recipe = made.recipe(names)
    assert recipe_to_yaml(recipe).count("value: [0.") == 3
    headers = {folder: read_model_header(folder) for folder in folders.values()}
    steps = {step.output: step.parameters["t"] for step in make_plan(recipe, headers).steps}
    assert steps["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.2)
    assert steps["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(0.5)
    assert steps["model.layers.2.self_attn.q_proj.weight"] == pytest.approx(0.9)
    assert steps["model.embed_tokens.weight"] == steps["model.norm.weight"] == pytest.approx(0.3)


def test_values_between_whole_layers_are_named_by_position(folders: dict[str, str]) -> None:
    searched = [SearchedParameter("weight", 0.0, 1.5, ("layer_group",))]
    groups = even_layer_groups(6, 4)
    made = template(folders, searched=searched, n_layers=6, layer_groups=groups, smooth=True, module_groups={})
    assert made.gradients == (("weight[@0]", "weight[@1.7]", "weight[@3.3]", "weight[@5]"),)


def test_halves_are_a_baseline_if_the_space_contains_the_point(folders: dict[str, str]) -> None:
    values = template(folders, "dare_ties").baseline_values(())["dare_ties:0.5"]
    assert set(values.values()) == {0.5}
    weight = SearchedParameter("weight", 0.0, 1.0, ("expert",))
    for density, held in ((0.5, True), (0.7, False)):
        made = template(folders, "dare_ties", searched=[weight], fixed={"density": density})
        assert ("dare_ties:0.5" in made.baselines(())) == held
    narrow = [SearchedParameter("weight", 0.0, 0.4, ("expert",))]
    assert "dare_ties:0.5" not in template(folders, "dare_ties", searched=narrow, fixed={"density": 0.5}).baselines(())


def test_recipe_of_the_template_survives_its_file(folders: dict[str, str], tmp_path: Path) -> None:
    from evomerge.recipe import read_recipe, write_recipe

    made = template(folders, "dare_ties")
    recipe = made.recipe(made.space.decode([0.37] * made.space.dimension), name="c000007")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_without_groups_the_recipe_is_a_whole_model_merge(folders: dict[str, str]) -> None:
    made = template(
        folders,
        searched=default_searched(method_spec("task_arithmetic"), ("expert",)),
        layer_groups=[(0, N_LAYERS)],
        module_groups={},
    )
    assert [parameter.name for parameter in made.space.parameters] == ["weight[a]", "weight[b]"]
    recipe = made.recipe({"weight[a]": 0.2, "weight[b]": 0.4})
    assert len(recipe.slices) == 1
    assert all(source.layer_range is None for source in recipe.slices[0].sources)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": None}, RecipeError, "needs a base model"),
        ({"method": "slerp", "searched": [SearchedParameter("t", 0, 1, ())]}, RecipeError, "takes exactly 1 expert"),
        ({"layer_groups": [(0, 1), (2, 3)]}, SpaceError, "must be consecutive"),
        ({"layer_groups": [(0, 2)]}, SpaceError, "cover 0 to 3"),
        ({"layer_groups": [(0, 0), (0, 3)]}, SpaceError, "must be consecutive"),
        ({"searched": [SearchedParameter("density", 0, 1, ())]}, RecipeError, "has no parameter 'density'"),
        ({"method": "ties", "searched": [SearchedParameter("density", 0, 2, ())]}, SpaceError, "outside the range of ties"),
        ({"searched": [SearchedParameter("normalize", 0, 1, ())]}, SpaceError, "is a switch"),
        ({"searched": [SearchedParameter("lambda", 0, 1, ("expert",))]}, SpaceError, "cannot vary per expert"),
        ({"searched": [SearchedParameter("lambda", 0, 1, ())]}, RecipeError, "needs 'weight'"),
        ({"fixed": {"weight": 1.0}}, RecipeError, "both searched and fixed"),
        ({"searched": [SearchedParameter("weight", 1, 0, ())]}, SpaceError, "low < high"),
    ],
)  # fmt: skip
def test_invalid_templates_are_refused(
    folders: dict[str, str], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        template(folders, **changes)


@pytest.mark.parametrize(
    ("density", "fixed", "message"),
    [
        ((0.1, 0.8), {}, r"density is in \[0.1, 0.8\] with epsilon up to 0.15"),
        ((0.2, 1.0), {}, "narrow the bounds of density"),
        (None, {"density": 0.3}, r"density is in \[0.3, 0.3\] with epsilon up to 0.4"),
        ((0.2, 0.8), {}, None),
        (None, {"density": 1.0}, None),
    ],
)
def test_bounds_that_allow_no_merge_are_refused(
    folders: dict[str, str], density: tuple[float, float] | None, fixed: dict[str, float], message: str | None
) -> None:
    searched = (
        SearchedParameter("epsilon", 0, 0.4, ()) if density is None else SearchedParameter("density", *density, ())
    )
    made = template(folders, method="della", searched=[searched], fixed={"weight": 1.0, **fixed})
    if message is None:
        made.check_bounds()
        return
    with pytest.raises(SpaceError, match=message):
        made.check_bounds()


def test_even_layer_groups_divide_the_layers() -> None:
    assert even_layer_groups(6, 4) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    with pytest.raises(SpaceError, match="6 layers cannot be divided into 7 groups"):
        even_layer_groups(6, 7)
