"""A configuration with a list of methods: which of its settings each method gets, and what cannot be combined with a list."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

import evomerge
from evomerge.build import make_problem, parse_config
from evomerge.build.strategies import chosen_strategy
from evomerge.cli import tables
from evomerge.core import ConfigError, Split, Status
from evomerge.recipe import Recipe, write_recipe
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(place / name, seed=seed, n_layers=4)
    write_toy_task(place / "toy.yaml", n_items=4)
    return place


def settings(*methods: str, **changes: Any) -> dict[str, Any]:
    return {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "method": list(methods),
        "tasks": ["toy.yaml"],
        "strategy": "auto",
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local"},
        "budget": {"evaluations": 20},
        "finals": {"finalists": 1},
        **changes,
    }


def recipes(folder: Path, *methods: str, **changes: Any) -> dict[str, Recipe]:
    """By method, the recipe in the middle of its space."""
    problem = make_problem(parse_config(settings(*methods, **changes), folder=folder))
    return {recipe.method: recipe for recipe in problem.template.samples()}


def shared(recipe: Recipe) -> dict[str, Any]:
    """The parameters that all sources of a recipe share."""
    return {name: setting[0].value for name, setting in recipe.slices[0].parameters.items()}


def test_each_method_keeps_its_own_default_switches_unless_given(folder: Path) -> None:
    found = recipes(folder, "ties", "dare_ties", "linear")
    assert shared(found["ties"]) == {"normalize": False}
    assert shared(found["dare_ties"]) == shared(found["linear"]) == {}
    given = recipes(folder, "ties", "dare_ties", "linear", space={"fixed": {"normalize": True}})
    assert [shared(recipe) for recipe in given.values()] == [{"normalize": True}] * 3
    unsearched = recipes(folder, "ties", "dare_ties", space={"parameters": {"density": {}}, "fixed": {"weight": 1.0}})
    assert [shared(recipe) for recipe in unsearched.values()] == [{}, {}]


def test_settings_go_only_to_methods_that_have_the_parameter(folder: Path) -> None:
    space = {"parameters": {"weight": {"high": 2.0}, "gamma": {}}, "fixed": {"density": 0.25, "lambda": 0.5}}
    found = recipes(folder, "task_arithmetic", "breadcrumbs", space=space)
    assert shared(found["task_arithmetic"]) == {"lambda": 0.5}
    of_source = {method: set(recipe.slices[0].sources[0].parameters) for method, recipe in found.items()}
    assert of_source == {"task_arithmetic": {"weight"}, "breadcrumbs": {"weight", "gamma", "density"}}
    with pytest.raises(ConfigError, match="has no parameter 'gama'; did you mean 'gamma'"):
        recipes(folder, "breadcrumbs", "ties", space={"fixed": {"gama": 0.5}})


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        (("ties", "slerp"), {}, "'slerp' takes exactly 1 expert"),
        (("ties", "tis"), {}, "unknown merge method 'tis'; did you mean 'ties'"),
        (("ties", "della", "ties"), {}, "a method appears twice"),
        (
            ("task_arithmetic", "linear"),
            {"space": {"stacking": {"parameters": True}}},
            "stacking supports only one method, got task_arithmetic, linear",
        ),
        (("ties", "linear"), {"strategy": "m2n2"}, "space.method: strategy m2n2 crosses whole models"),
    ],
)
def test_invalid_lists_of_methods_are_refused(folder: Path, methods: Any, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_problem(parse_config(settings(*methods, **changes), folder=folder))


@pytest.mark.parametrize("methods", [("della",), ("ties", "della_linear")])
def test_a_run_started_with_bounds_that_are_now_refused_can_be_read(folder: Path, methods: Any) -> None:
    space = {"parameters": {"weight": {}, "density": {"low": 0.1, "high": 1.0}}}
    config = parse_config(settings(*methods, space=space), folder=folder)
    with pytest.raises(ConfigError, match="narrow the bounds of density"):
        make_problem(config)
    make_problem(config, begun=True)


def test_a_task_name_must_not_look_like_a_cost(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tasks: 'cost.items': names that start with 'cost.' are reserved for costs; rename it"
    ):
        make_problem(parse_config(settings("ties", tasks=[{"task": "toy.yaml", "name": "cost.items"}]), folder=folder))


def test_a_tree_of_sources_accepts_only_weights(folder: Path) -> None:
    nested = {"name": "map", "nested": True}
    with pytest.raises(ConfigError, match=r"must be the weight of one source, but density\[a\] is not"):
        make_problem(parse_config(settings("ties", strategy=nested), folder=folder))
    fixed = {"parameters": {"weight": {}}, "fixed": {"density": 0.5}}
    make_problem(parse_config(settings("ties", strategy=nested, space=fixed), folder=folder))


def test_methods_with_nothing_to_search_can_be_chosen(folder: Path) -> None:
    made = make_problem(parse_config(settings("karcher", "ties", "model_stock"), folder=folder))
    names = ["method", "weight[a]", "weight[b]", "density[a]", "density[b]"]
    assert [parameter.name for parameter in made.space.parameters] == names
    assert [recipe.method for recipe in made.template.samples()] == ["karcher", "ties", "model_stock"]
    fixed = {"parameters": {"density": {}}, "fixed": {"weight": 1.0}}
    assert recipes(folder, "task_arithmetic", "ties", space=fixed).keys() == {"task_arithmetic", "ties"}
    only_choices = make_problem(parse_config(settings("karcher", "model_stock"), folder=folder))
    assert only_choices.space.choices == (2,)


def test_a_users_recipe_is_a_point_of_its_method(folder: Path) -> None:
    plain = make_problem(parse_config(settings("ties", "della", "dare_ties"), folder=folder))
    point = np.random.default_rng(1).uniform(0.3, 0.6, plain.space.dimension)
    recipe = plain.template.recipe(plain.space.decode(point))
    assert recipe.method == "della"
    write_recipe(recipe, folder / "mine.yml")
    wanted = settings("ties", "della", "dare_ties", baselines={"recipes": ["mine.yml"]})
    made = make_problem(parse_config(wanted, folder=folder))
    found = made.own_values["recipe:mine"]
    assert made.template.recipe(found) == recipe
    own = [name for name in found if "density" not in name or name.startswith("della.")]
    expected = plain.space.decode(point)
    assert {name: found[name] for name in own} == pytest.approx({name: expected[name] for name in own}, abs=1e-12)


def test_a_search_chooses_its_method_and_tables_show_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "search.yaml").write_text(yaml.safe_dump(settings("task_arithmetic", "ties", "dare_ties")))
    config = evomerge.load_config(folder / "search.yaml")
    assert chosen_strategy(make_problem(config)).name == "catcma"
    state = evomerge.run_search(config, tmp_path / "run")
    assert [state.evaluations[name, Split.SEARCH].status for name in state.entries] == [Status.OK] * 20
    run = evomerge.open_run(tmp_path / "run")
    proposed = [run.recipe(name).method for name, entry in state.entries.items() if not entry.baseline]
    assert len(set(proposed)) > 1
    chosen = {row["id"]: row["method"] for row in run.records() if not row["baseline"]}
    assert chosen == dict(
        zip([name for name, entry in state.entries.items() if not entry.baseline], proposed, strict=True)
    )
    assert run.chosen_methods([*chosen, "uniform"]) == chosen | {"uniform": "task_arithmetic"}
    out = io.StringIO()
    monkeypatch.setattr(tables, "CONSOLE", Console(file=out, width=120))
    tables.print_front(run)
    tables.print_summary(run)
    page = evomerge.write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "method" in out.getvalue()
    assert "<th>method</th>" in page
    best = str(state.best_id)
    assert f"{best} (best, {run.chosen_methods([best])[best]})" in out.getvalue()
    assert len(evomerge.resume_search(tmp_path / "run", overrides=["budget.evaluations=22"]).entries) == 22
    merged = evomerge.merge_recipe(tmp_path / "run" / "best.yaml", tmp_path / "merged")
    assert (merged / "model.safetensors").exists()
