"""A space in which the method is a choice: which coordinates methods share, and what its points and baselines are."""

from collections.abc import Sequence
from typing import Any

import pytest

from evomerge.core import SpaceError
from evomerge.recipe import MethodsTemplate, RecipeTemplate, default_searched, method_spec

EXPERTS = {"a": "/a", "b": "/b"}


def template(method: str, **changes: Any) -> RecipeTemplate:
    arguments: dict[str, Any] = {
        "method": method,
        "base": "/base",
        "experts": EXPERTS,
        "searched": default_searched(method_spec(method), ("expert",)),
        "n_layers": 4,
        "out_dtype": "bfloat16",
        "seed": 7,
        "fixed": {"normalize": False},
    }
    return RecipeTemplate(**{**arguments, **changes})


def choice(*methods: str) -> MethodsTemplate:
    return MethodsTemplate([template(method) for method in methods])


@pytest.mark.parametrize(
    ("methods", "own"),
    [
        (("task_arithmetic", "linear"), []),
        (("task_arithmetic", "ties", "dare_ties"), ["density[a]", "density[b]"]),
        (("della", "ties"), ["density[a]", "density[b]", "ties.density[a]", "ties.density[b]"]),
        (("ties", "della", "della_linear"), ["density[a]", "density[b]", "della.density[a]", "della.density[b]"]),
    ],
)
def test_parameters_with_the_same_bounds_share_a_coordinate(methods: Sequence[str], own: list[str]) -> None:
    first, *rest = choice(*methods).space.parameters
    assert (first.name, first.choices) == ("method", tuple(methods))
    assert [parameter.name for parameter in rest] == ["weight[a]", "weight[b]", *own]


def test_parameters_with_different_bounds_have_separate_families() -> None:
    methods = [
        template(
            method,
            searched=default_searched(method_spec(method), ("expert", "layer_group")),
            layer_groups=[(0, 2), (2, 4)],
        )
        for method in ("ties", "della")
    ]
    families = {parameter.name: parameter.family for parameter in MethodsTemplate(methods).space.parameters}
    assert families["density[a,0-1]"] == families["density[a,2-3]"] == "density[a]"
    assert families["della.density[a,0-1]"] == families["della.density[a,2-3]"] == "della.density[a]"


def test_coordinate_affects_only_methods_that_have_the_parameter() -> None:
    space = choice("task_arithmetic", "ties", "della", "dare_ties").space
    found = dict(zip([parameter.name for parameter in space.parameters], space.conditions, strict=True))
    assert found["method"] is None
    assert found["weight[a]"] is None
    assert found["density[a]"] == (0, (1, 3))
    assert found["della.density[b]"] == (0, (2,))


def test_point_gives_the_recipe_of_its_method() -> None:
    made = choice("task_arithmetic", "dare_ties", "della")
    values = {
        "weight[a]": 0.25, "weight[b]": 1.25, "density[a]": 0.5, "density[b]": 0.75,
        "della.density[a]": 0.375, "della.density[b]": 0.625,
    }  # fmt: skip
    weights = {"weight[a]": 0.25, "weight[b]": 1.25}
    expected = [
        template("task_arithmetic").recipe(weights, "x"),
        template("dare_ties").recipe({**weights, "density[a]": 0.5, "density[b]": 0.75}, "x"),
        template("della").recipe({**weights, "density[a]": 0.375, "density[b]": 0.625}, "x"),
    ]
    for index, recipe in enumerate(expected):
        assert made.recipe({"method": float(index), **values}, "x") == recipe
    assert [recipe.seed for recipe in expected] == [0, 7, 7]


def test_baselines_cover_all_methods_and_are_points_of_a_method_that_makes_them() -> None:
    methods = ("ties", "task_arithmetic", "dare_ties")
    made = choice(*methods)
    recipes, points = made.baselines((0.5,)), made.baseline_values((0.5,))
    assert {"source:a", "uniform", "task_arithmetic:0.5", "ties:0.5", "dare_ties:0.5"} <= set(recipes)
    assert set(points) == set(recipes)
    chosen = {name: methods[int(values["method"])] for name, values in points.items()}
    assert chosen["source:a"] == "ties"  # the first method that makes it
    assert chosen["uniform"] == chosen["task_arithmetic:0.5"] == "task_arithmetic"
    assert chosen["dare_ties:0.5"] == "dare_ties"
    for name in ("ties:0.5", "dare_ties:0.5"):
        assert made.recipe(points[name]) == recipes[name]
    for values in points.values():
        made.space.encode(values)  # raises an error if they are incomplete or out of bounds
    assert points["task_arithmetic:0.5"]["density[a]"] == pytest.approx(0.525)  # unused, so the middle of its bounds


def test_samples_include_every_method() -> None:
    assert [recipe.method for recipe in choice("ties", "della").samples()] == ["ties", "della"]


def test_repeated_method_is_refused() -> None:
    with pytest.raises(SpaceError, match="ties, della, ties: a method appears twice"):
        choice("ties", "della", "ties")
