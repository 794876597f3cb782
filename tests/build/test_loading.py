"""Defaults that a search sets are written out when its configuration is loaded."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from evomerge.build import load_config, parse_config
from evomerge.build.commands.changes import resumed_config
from evomerge.core import ConfigError
from evomerge.recipe import METHODS, default_switches
from evomerge.search import Resolved, RunDirectory

WEIGHTS = {"weight": {"low": 0.0, "high": 1.0}}


@pytest.mark.parametrize(
    ("space", "fixed"),
    [
        ({"method": "ties"}, {"normalize": False}),
        ({"method": "della", "parameters": WEIGHTS, "fixed": {"density": 0.5}}, {"density": 0.5, "normalize": False}),
        ({"method": "ties", "fixed": {"normalize": True}}, {"normalize": True}),
        ({"method": "ties", "parameters": {"density": {}}, "fixed": {"weight": 1}}, {"weight": 1}),
        ({"method": "linear"}, {}),
        ({"method": "task_arithmetic"}, {}),
        ({"method": "tise"}, {}),
        ({"method": ["ties", "linear"]}, {}),  # each method has its own; see test_methods
    ],
)
def test_searched_weights_are_not_divided_by_their_sum(tmp_path, space, fixed):
    settings = {"models": {"base": "b", "experts": {"a": "a"}}, "space": space, "tasks": ["x"], "budget": {"hours": 1}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings))
    assert load_config(tmp_path / "search.yaml").space.fixed == fixed


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"budget": 300, "n_workers": 4}),
        (
            {"strategy": {"name": "nevergrad", "budget": 50, "optimizer": "CMA"}},
            {"budget": 50, "optimizer": "CMA", "n_workers": 4},
        ),
        ({"budget": {"hours": 1}, "cluster": {"workers": "auto"}}, {}),
        ({"cluster": {"workers": 1}}, {"budget": 300}),
        ({"strategy": "cma_es"}, {}),
    ],
)
def test_nevergrad_options_include_the_searchs_budget_and_workers(changes, options):
    settings = {
        "models": {"base": "b", "experts": {"a": "a"}},
        "tasks": ["x"],
        "strategy": "nevergrad",
        "budget": {"evaluations": 300},
        "cluster": {"workers": 4},
        **changes,
    }
    config = load_config(settings)
    assert config.strategy.options == options
    again = parse_config(config.model_dump(mode="json"), folder=Path("/"))
    assert again.strategy == config.strategy, "a resumed run would have another strategy"


def test_values_from_python_are_taken_unchanged(tmp_path):
    settings = {
        "models": {"experts": {"a": tmp_path / "a", "b": "b"}},
        "method": "linear",
        "tasks": ("x",),
        "budget": {"hours": 1},
    }
    config = load_config(settings, {"engine.options.share": 1e-5, "needs": "\U0001f600", "tasks.0.limit": 3})
    assert config.engine.options == {"share": 1e-5}
    assert config.needs == "\U0001f600"
    assert (config.tasks[0].task, config.tasks[0].limit) == ("x", 3)
    assert config.models.experts["a"].path == str(tmp_path / "a")
    weights = np.linspace(0.2, 1.0, 3)
    config = load_config(settings, {"seed": np.int64(3), "baselines.task_arithmetic": weights})
    assert (config.seed, list(config.baselines.task_arithmetic)) == (3, weights.tolist())
    for refused in ((settings | {"seed": {1}}, {}), (settings, {"seed": {1}})):
        with pytest.raises(ConfigError, match=r"cannot be a setting; .* got set"):
            load_config(*refused)
    with pytest.raises(ConfigError, match="expected a configuration file or a mapping of settings, got list"):
        load_config([settings])
    assert load_config(settings, "budget.evaluations=9").budget.evaluations == 9


def test_m2n2_gets_no_fixed_switches(tmp_path):
    settings = {"models": {"experts": {"a": "a", "b": "b"}}, "tasks": ["x"], "budget": {"hours": 1}, "strategy": "m2n2"}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings))
    assert load_config(tmp_path / "search.yaml").space.fixed == {}


def test_which_methods_have_default_switches():
    assert {name for name, spec in METHODS.items() if default_switches(spec)} == {"ties", "della"}


def test_a_run_started_without_default_switches_is_resumed_without_them(tmp_path):
    settings = {
        "models": {"base": "b", "experts": {"a": "a"}},
        "method": "ties",
        "tasks": ["x"],
        "budget": {"hours": 1},
    }
    begun = parse_config(settings, folder=tmp_path)
    space = {"fingerprint": "", "parameters": []}
    resolved = Resolved.model_validate({"config": begun.model_dump(mode="json"), "given": settings, "space": space})
    resumed, _ = resumed_config(RunDirectory(tmp_path), resolved, ["budget.hours=2"])
    assert resumed.space == begun.space
    assert resumed.space.fixed == {}
