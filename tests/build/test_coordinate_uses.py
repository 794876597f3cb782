"""No coordinate of a space is without effect, whatever its groups; samples of a space can be merged as long as most of the space can."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.build import Problem, make_problem, open_run, parse_config, resume_search, start_search
from evomerge.build.coordinate_uses import values_in_space
from evomerge.core import ConfigError
from evomerge.plan import make_plan
from evomerge.recipe import MethodsTemplate, RecipeTemplate
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task

TASK = Path(__file__).resolve().parents[2] / "tasks" / "reverse.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(place / name, seed=seed, n_layers=4)
    return place


def problem(folder: Path, models: dict[str, Any] | None = None, budget: int = 999, **space: Any) -> Problem:
    settings = {
        "models": models or {"base": "./base", "experts": {"a": "./a", "b": "./b"}},
        "space": space,
        "tasks": [str(TASK)],
        "budget": {"evaluations": budget},
    }
    return make_problem(parse_config(settings, folder=folder))


def names(made: Problem) -> set[str]:
    return {parameter.name for parameter in made.space.parameters}


def tensors_moved(made: Problem) -> dict[str, int]:
    """Coordinate -> the number of tensors whose parameters it changes."""

    def steps(template: Any, values: dict[str, float]) -> list[Any]:
        return list(make_plan(template.recipe(values), made.headers).steps)

    moved: dict[str, int] = {}
    for template in made.template.methods if isinstance(made.template, MethodsTemplate) else [made.template]:
        assert isinstance(template, RecipeTemplate)
        middle = dict.fromkeys((parameter.name for parameter in template.parameters), 0.5)
        before = steps(template, middle)
        for name in middle:
            after = steps(template, middle | {name: 0.7})
            moved[name] = sum(one != other for one, other in zip(before, after, strict=True))
    return moved


GROUPS: list[dict[str, Any]] = [
    {"layer_groups": 4, "module_groups": ["embeddings", "norms", "rest"]},
    {"layer_groups": 3, "module_groups": ["embeddings", "norms", "rest"], "smooth": True},
    {"layer_groups": 4, "module_groups": ["attention", "mlp", "norms", "rest"], "method": "ties"},
    {"layer_groups": 2, "module_groups": ["mlp", "rest"], "method": ["task_arithmetic", "ties"]},
    {"layer_groups": 4, "smooth": True},
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_coordinate_moves_a_tensor(tmp_path: Path, groups: dict[str, Any], *, tied: bool) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=4, tied=tied)
    made = problem(tmp_path, **groups)
    assert all(tensors_moved(made).values())


def test_embeddings_have_values_only_in_the_first_and_last_layer_groups(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=4, tied=False)
    groups = {"layer_groups": 4, "module_groups": ["embeddings", "rest"]}
    found = {name for name in names(problem(tmp_path, **groups)) if "embeddings" in name and "[a" in name}
    assert found == {"weight[a,0-0,embeddings]", "weight[a,3-3,embeddings]"}
    found = {name for name in names(problem(tmp_path, **groups, smooth=True)) if "embeddings" in name and "[a" in name}
    assert found == {"weight[a,@0,embeddings]"}


def test_a_parameter_with_an_empty_per_has_one_value(folder: Path) -> None:
    axes = {"layer_groups": 2, "module_groups": ["mlp", "rest"]}
    space = {"method": "ties", "parameters": {"weight": {"per": ["expert"]}, "density": {"per": []}}, **axes}
    made = problem(folder, **space)
    assert names(made) == {"weight[a]", "weight[b]", "density"}
    assert all(tensors_moved(made).values())


def test_a_run_keeps_the_coordinates_it_was_started_with(folder: Path) -> None:
    settings = {
        "models": {"base": "./base", "experts": {"a": "./a", "b": "./b"}},
        "space": {"method": ["linear", "ties"], "layer_groups": 4, "module_groups": ["embeddings", "rest"]},
        "tasks": [str(TASK)],
        "budget": {"evaluations": 999},
    }
    config = parse_config(settings, folder=folder)
    new = names(make_problem(config))
    unused = {"weight[a,1-1,embeddings]", "density[b,2-2,embeddings]"}
    assert names(make_problem(config, begun=True, coordinates=new)) == new
    assert names(make_problem(config, begun=True, coordinates=new | unused)) == new | unused


def test_a_run_with_unused_coordinates_can_be_resumed_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("base", "a")):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=3)
    write_toy_task(tmp_path / "toy.yaml", n_items=2)
    settings = {
        "models": {"base": str(tmp_path / "base"), "experts": {"a": str(tmp_path / "a")}},
        "space": {"layer_groups": 3, "module_groups": ["embeddings", "rest"]},
        "tasks": [str(tmp_path / "toy.yaml")],
        "strategy": "random",
        "engine": "transformers",
        "cluster": {"kind": "local"},
        "budget": {"evaluations": 8},
        "finals": {"finalists": 0},
    }
    with monkeypatch.context() as before:  # as in runs started before 2026-11-29
        before.setattr("evomerge.build.templates.unused_coordinates", lambda *_: set())
        start_search(settings, tmp_path / "run")
    resume_search(tmp_path / "run", overrides="budget.evaluations=10")
    run = open_run(tmp_path / "run")
    assert run.space.dimension == 6
    assert all(run.recipe(row["id"]) is not None for row in run.records())
    assert problem(tmp_path, settings["models"], **settings["space"]).space.dimension == 4


def test_attention_found_in_few_layers_has_values_only_there(tmp_path: Path) -> None:
    size = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "block_ff_dim": 64,
        "num_key_value_heads": 2, "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "conv"], "max_position_embeddings": 64,
    }  # fmt: skip
    write_tiny_llama(tmp_path / "base", seed=0)  # for its tokenizer
    for name in ("base", "a", "b"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **size)).save_pretrained(tmp_path / name)
        if name != "base":
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (tmp_path / name / file).write_bytes((tmp_path / "base" / file).read_bytes())
    groups: dict[str, Any] = {"layer_groups": 3, "module_groups": ["attention", "rest"]}
    found = {name for name in names(problem(tmp_path, **groups)) if "attention" in name and "[a" in name}
    assert found == {"weight[a,2-3,attention]"}
    smooth = problem(tmp_path, **groups | {"layer_groups": 6}, smooth=True)
    assert {name for name in names(smooth) if "attention" in name and "[a" in name} == {"weight[a,@2,attention]"}
    assert all(tensors_moved(smooth).values())
    between = problem(tmp_path, **groups | {"layer_groups": 4}, smooth=True)  # layer 2 lies between two values
    assert isinstance(between.template, RecipeTemplate)
    values = {name: 1.4 if "attention" in name else 0.1 for name in names(between)}
    found = values_in_space(between.template.recipe(values), between.template, between.headers)
    assert found == pytest.approx(values)


def test_bounds_around_0_are_searched_for_normalised_weights(folder: Path) -> None:
    experts = {"experts": {"a": "./a", "b": "./b"}}
    groups: dict[str, Any]
    for groups in ({}, {"layer_groups": 2}, {"layer_groups": 2, "smooth": True}):
        made = problem(folder, experts, method="linear", parameters={"weight": {"low": -1, "high": 1}}, **groups)
        assert made.space.dimension == (4 if groups else 2)


@pytest.mark.parametrize(
    ("method", "searched", "message"),
    [
        ("task_arithmetic", {"weight": {"low": 0.3, "high": 0.3 + 1e-14}}, "are practically one value; fix it"),
        ("karcher", {"max_iter": {"low": 5, "high": 15}}, "is a whole number and cannot be searched"),
    ],
)
def test_parameters_that_cannot_be_searched_are_refused(
    folder: Path, method: str, searched: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        problem(folder, method=method, parameters=searched)


@pytest.mark.parametrize("groups", [1, [[0, 2], [2, 4]]])
def test_smooth_groups_must_be_given_by_their_number(folder: Path, groups: Any) -> None:
    with pytest.raises(ConfigError, match=r"space\.smooth: set space\.layer_groups to the number"):
        problem(folder, layer_groups=groups, smooth=True)


def test_more_values_than_layers_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="layer_groups: 4 layers cannot be divided into 5 groups"):
        problem(folder, layer_groups=5, smooth=True)
