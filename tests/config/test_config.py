from pathlib import Path
from typing import Any

import pytest

from evomerge.config import SearchConfig, parse_config, read_config
from evomerge.core import ConfigError

MINIMAL: dict[str, Any] = {
    "models": {"base": "zoo/base", "experts": {"a": "zoo/a", "b": "zoo/b"}},
    "tasks": ["tasks/x.yaml"],
    "budget": {"evaluations": 10},
}


def parse(changes: dict[str, Any], *overrides: str) -> Any:
    return parse_config({**MINIMAL, **changes}, folder=Path("/somewhere"), overrides=overrides)


def test_short_forms_and_relative_paths() -> None:
    config = parse({"method": "ties", "strategy": "nsga2", "objectives": ["x"]})
    assert config.models.base.path == "/somewhere/zoo/base"
    assert config.tasks[0].task == "/somewhere/tasks/x.yaml"
    assert config.space.method == "ties"
    assert config.strategy.name == "nsga2"
    assert config.objectives[0].name == "x"
    assert parse({"tasks": ["../t/x.yaml", "/t/y.yaml"]}).tasks[0].task == "/t/x.yaml"


def test_a_list_of_methods_is_a_choice_and_a_list_of_one_is_that_method() -> None:
    assert parse({"method": ["ties", "della"]}).space.methods == ("ties", "della")
    assert parse({"method": ["ties"]}).space == parse({"space": {"method": "ties"}}).space
    assert parse({}, "method=[ties,della]").space.methods == ("ties", "della")
    again = SearchConfig.model_validate(parse({"method": ["ties", "della"]}).model_dump(mode="json"))
    assert again.space.methods == ("ties", "della")


def test_a_single_item_needs_no_list_and_an_engine_can_be_given_by_kind() -> None:
    config = parse({"tasks": "tasks/x.yaml", "objectives": "x", "engine": "transformers"}, "tasks.0.limit=5")
    assert [(task.task, task.limit) for task in config.tasks] == [("/somewhere/tasks/x.yaml", 5)]
    assert config.objectives[0].name == "x"
    assert config.engine.kind == "transformers"


def test_a_path_may_start_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    changes = {"models": {"base": "~/base", "experts": {"a": "~/a+~/lora", "b": "b"}}, "tasks": ["~/x.yaml"]}
    config = parse(changes)
    assert config.models.base.path == "/home/me/base"
    assert config.models.experts["a"].key == "/home/me/a+/home/me/lora"
    assert config.tasks[0].task == "/home/me/x.yaml"


def test_overrides_reach_nested_keys_and_are_parsed_as_yaml() -> None:
    config = parse({}, "budget.evaluations=7", "space.module_groups=[mlp, rest]", "deterministic=true")
    assert config.budget.evaluations == 7
    assert config.space.module_groups == ("mlp", "rest")
    assert config.deterministic


def test_overrides_reach_into_lists_and_short_forms() -> None:
    config = parse(
        {"strategy": "nsga2", "objectives": ["x"]},
        "strategy.population_size=8", "models.experts.a.lora=zoo/a-lora", "models.base.path=zoo/other", "tasks.0.limit=50",
        "objectives.0.direction=minimize",
    )  # fmt: skip
    assert config.strategy.name == "nsga2"
    assert config.strategy.options == {"population_size": 8}
    assert config.models.experts["a"].key == "/somewhere/zoo/a+/somewhere/zoo/a-lora"
    assert config.models.base.path == "/somewhere/zoo/other"
    assert (config.tasks[0].task, config.tasks[0].limit) == ("/somewhere/tasks/x.yaml", 50)
    assert config.objectives[0].direction == "minimize"


def test_strategy_options_pass_through() -> None:
    assert parse({"strategy": {"name": "cma_es", "sigma0": 0.2}}).strategy.options == {"sigma0": 0.2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bugdet": {}}, "bugdet: unknown key; did you mean 'budget'"),
        ({"models": {"base": "a", "expert": {}}}, "models.expert: unknown key; did you mean 'experts'"),
        ({"models": {"experts": {"a/b": "x"}}}, "expert name 'a/b' must consist of"),
        ({"budget": {"evaluations": 0}}, "budget.evaluations: must be greater than or equal to 1 (got 0)"),
        ({"budget": {}}, "give at least one of evaluations, items, hours"),
        ({"budget": {"hours": float("nan")}}, "budget.hours: must be a finite number"),
        ({"seed": "x"}, "seed: must be a whole number (got 'x')"),
        ({"seed": 1.5}, "seed: must be a whole number (got 1.5)"),
        ({"seed": True}, "seed: must be a whole number (got 'true')"),
        ({"baselines": {"task_arithmetic": [0.5, True]}}, "baselines.task_arithmetic.1: must be a number (got 'true')"),
        (
            {"space": {"layer_groups": [[0, 2], [2, True]]}},
            "space.layer_groups.1.1: must be a whole number (got 'true')",
        ),
        (
            {"space": {"stacking": {"models": {"a": [False, 2]}}}},
            "space.stacking.models.a.0: must be a whole number (got 'false')",
        ),
        ({"budget": 100}, "budget: must be a mapping of settings: evaluations, items, hours (got 100)"),
        ({"budget": None}, "budget: must be a mapping of settings: evaluations, items, hours (got nothing)"),
        ({"tasks": {"x": 1}}, "tasks: must be a list"),
        ({"models": {"experts": ["zoo/a"]}}, "models.experts: must be a mapping, {name: value, ...}"),
        ({"models": {"base": "zoo/base"}}, "models.experts: is missing"),
        ({"experts": {}}, "experts: unknown key; did you mean 'models.experts'?"),
        ({"layer_groups": 2}, "layer_groups: unknown key; did you mean 'space.layer_groups'?"),
        ({"budget": {"epochs": 2}}, "budget.epochs: unknown key; known: evaluations, items, hours"),
        ({"evaluation": {"function": "sphere"}}, "evaluation.function: unknown key; known: kind, search_items,"),
        ({"space": {"layer_groups": "four"}}, "space.layer_groups: must be a whole number or a list (got 'four')"),
        (
            {"space": {"fixed": {"density": "low"}}},
            "space.fixed.density: must be a number or true or false (got 'low')",
        ),
        (
            {"space": {"parameters": {"weight": 0.3}}},
            "space.parameters.weight: expected bounds such as {low: 0, high: 1}; a ",
        ),
        (
            {"space": {"parameters": {"weight": [0, 1]}}},
            "space.parameters.weight: expected bounds such as {low: 0, high: 1};",
        ),
        ({"cluster": {"workers": "two"}}, "cluster.workers: must be a whole number or 'auto' (got 'two')"),
        ({"name": "../escape"}, "must be printable, without path separators"),
        ({"name": "a\nb"}, "must be printable, without path separators"),
        ({"tasks": []}, "tasks: is missing"),
        ({"models": {"experts": {}}}, "models.experts: must not be empty"),
        ({"models": {"experts": {1: "zoo/a"}}}, "models.experts.1: a key must be a string; put it in quotes (got 1)"),
        ({3: 4}, "3: a key must be a string; put it in quotes (got 3)"),
        ({"evaluation": "synthetic"}, "evaluation: must be a mapping of settings, {kind: ..., ...} (got 'synthetic')"),
        ({"models": None}, "models: is missing"),
        ({"method": "ties", "space": {"method": "slerp"}}, "method is 'ties' but space.method is 'slerp'"),
        (
            {"method": ["a", "b"], "space": {"method": ["b", "a"]}},
            "method is ['a', 'b'] but space.method is ['b', 'a']",
        ),
        ({"method": []}, "method: expected a merge method, or a list of merge methods"),
        ({"space": {"method": ["ties", 3]}}, "space.method: expected a merge method, or a list of merge methods"),
        ({"method": 3}, "1 problem\n  - method: expected a merge method, or a list of merge methods"),
        ({"evaluation": {"kind": "synthetic"}}, "uses neither models, tasks nor"),
        ({"evaluation": {"kind": "magic"}}, "evaluation: kind: must be 'lm_eval' or 'synthetic', got 'magic'"),
        ({"cluster": {"workers": 0}}, "must be at least 1 or 'auto' (got 0)"),
        ({"cluster": {"kind": "local", "workers": 2}}, "cluster.kind local runs one engine; set cluster.workers to 1"),
        ({"cluster": {"kind": "local", "address": "auto"}}, "cluster: address: auto has no effect with kind: local"),
        ({"engine": {"kind": "transformers", "tensor_parallel": 2}}, "tensor_parallel needs kind: vllm"),
        ({"engine": {"options": {"tensor_parallel_size": 2}}}, "use tensor_parallel instead"),
        ({"engine": {"options": {"a": [float("nan")]}}}, "engine.options: may contain only strings, finite numbers,"),
        ({"engine": {"kind": "vlm"}}, "engine.kind: must be 'auto', 'vllm' or 'transformers'"),
        ({"engine": "vlm"}, "engine.kind: must be 'auto', 'vllm' or 'transformers' (got 'vlm')"),
    ],
)
def test_invalid_settings_are_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["synthetic", "lm_eval", "path", "evaluation"])
def test_an_expert_may_have_the_name_of_a_setting(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"models": {"base": "b", "experts": {name: {"pathh": "x"}}}})
    assert f"models.experts.{name}.pathh: unknown key; did you mean 'path'?" in str(caught.value)


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"seed": -1, "engin": 1, "budget": {"evaluations": 0}})
    assert "3 problems" in str(caught.value)


@pytest.mark.parametrize("override", ["novalue", "budget.evaluations.x=1", "seed=[1", "tasks.1.limit=2", "tasks.x=2"])
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse({}, override)


def test_a_missing_or_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_parses(path: Path) -> None:
    read_config(path)
