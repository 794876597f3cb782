"""Configurations of mergekit-evolve are translated into ours: what mergekit makes of a genome lies in the translated search's space."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.build import load_config, make_problem
from evomerge.build.commands.mergekit_evolve import write_translated_config
from evomerge.build.coordinate_uses import values_in_space
from evomerge.core import CheckpointError, ConfigError, RecipeError
from evomerge.recipe import RecipeTemplate, read_recipe, with_folders
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=4)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GENOME = {"models": ["a", "b"], "base_model": "base", "merge_method": "ties"}


def translated(folder: Path, genome: dict[str, Any] | None = None, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings that are written, and the next steps that `evomerge init` prints."""
    evolve = {"genome": GENOME | (genome or {}), "tasks": ["toy.yaml"], "apply_chat_template": False, **changes}
    (folder / "evolve.yml").write_text(yaml.safe_dump(evolve))
    todo = write_translated_config(folder / "search.yaml", folder / "evolve.yml", overwrite=True)
    return yaml.safe_load((folder / "search.yaml").read_text()), todo


DECODE = """
import json, sys, numpy as np, pathlib
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition
genome = ModelGenome(ModelGenomeDefinition.model_validate(json.loads(sys.argv[1])))
shape = genome.initial_genotype().shape
values = np.random.default_rng(0).uniform(0.2, 0.9, shape)
pathlib.Path(sys.argv[2]).write_text(genome.genotype_merge_config(values).to_yaml())
"""


@pytest.mark.parametrize(
    "genome",
    [
        {},
        {"merge_method": "linear", "base_model": None},
        {"merge_method": "task_arithmetic", "layer_granularity": 2},
        {"merge_method": "dare_ties", "layer_granularity": 1, "filters": ["self_attn", "mlp"]},
        {"layer_granularity": 1, "smooth": True, "filters": ["mlp"]},
        {"layer_granularity": 2, "smooth": True, "normalize": False},
        {"models": ["base", "a", "b"], "normalize": False, "allow_negative_weights": True},
    ],
    ids=lambda genome: ",".join(f"{name}={value}" for name, value in genome.items()) or "ties",
)
def test_what_mergekit_makes_of_a_genome_is_a_point_of_the_space(
    folder: Path, mergekit: Callable[..., None], genome: dict[str, Any]
) -> None:
    # mergekit-evolve normalises unless told not to; our searches do so only if told to
    genome = ({"normalize": True} if genome.get("merge_method", "ties") in ("ties", "dare_ties") else {}) | genome
    translated(folder, genome)
    mergekit("-c", DECODE, json.dumps(GENOME | genome), folder / "theirs.yml")
    problem = make_problem(load_config(folder / "search.yaml", [f"tasks=[{folder / 'toy.yaml'}]"]))
    assert isinstance(problem.template, RecipeTemplate)
    recipe = read_recipe(folder / "theirs.yml")
    recipe = with_folders(recipe, lambda name: str(folder / name))
    values = values_in_space(recipe, problem.template, problem.headers)
    assert values is not None
    assert len(values) == problem.space.dimension
    assert len(set(values.values())) == len(values)


def test_the_remaining_settings_are_carried_over(folder: Path) -> None:
    tasks = [{"name": "toy.yaml", "weight": 2, "metric": "acc,none"}, {"name": "other.yaml", "weight": -0.5}]
    write_toy_task(folder / "other.yaml", n_items=4)
    for name in ("base", "a", "b"):
        write_tiny_llama(folder / name, seed=3, n_layers=4, dtype="float32")
    settings, todo = translated(folder, tasks=tasks, limit=3, num_fewshot=0, random_init=True)
    assert settings == {
        "models": {"base": "./base", "experts": {"a": "./a", "b": "./b"}},
        "space": {"method": "ties"},
        "tasks": [
            {"task": f"{name}.yaml", "name": name, "metric": "acc", "num_fewshot": 0} for name in ("toy", "other")
        ],
        "objectives": [
            {"name": "toy", "weight": 2.0},
            {"name": "other", "weight": 0.5, "direction": "minimize"},
        ],
        "evaluation": {"search_items": 3},
        "strategy": "cma_es",
        "budget": {"evaluations": 100},
        "seed": 0,
    }
    text = (folder / "search.yaml").read_text()
    assert "random_init is left out" in text
    assert "normalize: mergekit-evolve divides" in text
    assert "limit: candidates are scored on items drawn at random" in text
    assert "merges are float32 like the models, not bfloat16" in text
    assert todo == [f"evomerge search {folder / 'search.yaml'}"]


def test_conversations_and_random_items_are_carried_over(folder: Path) -> None:
    settings, todo = translated(folder, limit=1, shuffle=True, apply_chat_template=True, fewshot_as_multiturn=False)
    assert settings["evaluation"] == {"search_items": 2, "apply_chat_template": True, "fewshot_as_multiturn": False}
    assert "limit:" not in (folder / "search.yaml").read_text()
    assert "chat template" in todo[0]


def test_a_task_with_two_metrics_gets_two_names(folder: Path) -> None:
    tasks = [{"name": "toy.yaml", "weight": 1, "metric": "acc"}, {"name": "toy.yaml", "weight": 3}]
    settings, _ = translated(folder, tasks=tasks)
    assert [task["name"] for task in settings["tasks"]] == ["toy", "toy-2"]
    assert settings["objectives"] == [{"name": "toy", "weight": 1.0}, {"name": "toy-2", "weight": 3.0}]


@pytest.mark.parametrize(
    ("filters", "groups", "remark"),
    [
        (["self_attn.", "mlp"], ["attention", "mlp", "rest"], None),
        (["self_attn", "mlp", "norm", "embed"], ["attention", "mlp", "norms", "embeddings"], "filter embed becomes"),
        (["embed_tokens", "lm_head"], ["embeddings", "rest"], "filter lm_head becomes the module group embeddings"),
        (["q_proj"], None, "filter q_proj is left out"),
    ],
)
def test_filters_become_module_groups(
    folder: Path, filters: list[str], groups: list[str] | None, remark: str | None
) -> None:
    settings, todo = translated(folder, {"filters": filters})
    assert settings["space"].get("module_groups") == groups
    assert ("# filter" in (folder / "search.yaml").read_text()) == (remark is not None)
    assert remark is None or remark in (folder / "search.yaml").read_text()
    assert todo == [f"evomerge search {folder / 'search.yaml'}"]


def test_models_of_the_same_name_are_told_apart(folder: Path) -> None:
    for place in ("x", "y"):
        (folder / place).mkdir()
        write_tiny_llama(folder / place / "m", seed=7, n_layers=4)
    for place in ("x/m-2", ".hidden"):
        write_tiny_llama(folder / place, seed=7, n_layers=4)
    settings, _ = translated(folder, {"models": ["x/m-2", "x/m", "y/m", ".hidden"]})
    assert settings["models"]["experts"] == {"m-2": "./x/m-2", "m": "./x/m", "m-3": "./y/m", "hidden": ".hidden"}


def test_a_base_among_the_models_is_not_an_expert(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "base")
    settings, todo = translated(folder, {"models": ["link", "a"], "base_model": "base"})
    assert settings["models"] == {"base": "./base", "experts": {"a": "./a"}}
    assert todo == [f"evomerge search {folder / 'search.yaml'}"]
    settings, todo = translated(folder, {"models": ["base", "a"], "merge_method": "linear"})
    assert settings["models"] == {"experts": {"base-2": "./base", "a": "./a"}}
    assert todo == [f"evomerge search {folder / 'search.yaml'}"]


def test_hub_models_keep_their_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    for name, commit in (("math", "1" * 40), ("code", "2" * 40)):
        place = folder / "hub" / f"models--acme--{name}"
        for ref in ("main", "v1"):
            (place / "refs").mkdir(parents=True, exist_ok=True)
            (place / "refs" / ref).write_text(commit)
        shutil.copytree(folder / "a", place / "snapshots" / commit)
    settings, todo = translated(folder, {"models": ["acme/math", "acme/code@v1"]})
    pinned = "./hub/models--acme--code/snapshots/" + "2" * 40
    assert settings["models"]["experts"] == {"math": "acme/math", "code": pinned}
    assert todo == [f"evomerge search {folder / 'search.yaml'}"]
    with pytest.raises(CheckpointError, match="hf download"):
        translated(folder, {"models": ["a", "acme/other"]})


def test_slerp_takes_two_models_and_the_first_becomes_the_base(folder: Path) -> None:
    settings, todo = translated(folder, {"merge_method": "slerp", "layer_granularity": 2})
    assert settings["models"] == {"base": "./a", "experts": {"b": "./b"}}
    assert settings["space"] == {"method": "slerp", "layer_groups": 2}
    assert "base_model is left out" in (folder / "search.yaml").read_text()
    assert todo == [f"evomerge search {folder / 'search.yaml'}"]


@pytest.mark.parametrize(
    ("genome", "changes", "message"),
    [
        ({"models": ["a", "b", "base"], "merge_method": "slerp"}, {}, "slerp with 3 models"),
        ({"merge_method": "slerp", "filters": ["mlp"]}, {}, "does not support slerp with smooth or filters"),
        ({"layer_granularity": 3}, {}, "4 layers are not a multiple of 3"),
        ({"base_model": None}, {}, "base_model: is missing; ties needs it"),
        ({"models": ["base"]}, {}, "no model other than the base"),
        ({"merge_method": "della"}, {}, "genome.merge_method: must be"),
        ({"models": ["acme/nothing@v1", "a"]}, {}, "revision v1 of acme/nothing is not in the hub cache"),
        ({"smoth": True}, {}, "did you mean 'smooth'"),
        ({}, {"tasks": []}, "tasks: must not be empty"),
        ({}, {"limits": 3}, "did you mean 'limit'"),
    ],
)
def test_configurations_that_cannot_be_translated_are_refused(
    folder: Path, genome: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        translated(folder, genome, **changes)
    assert not (folder / "search.yaml").exists()


def test_other_commands_point_to_init_for_such_a_file(folder: Path) -> None:
    translated(folder)
    with pytest.raises(ConfigError, match=r"init --mergekit-evolve .*evolve\.yml` translates it"):
        load_config(folder / "evolve.yml")
    with pytest.raises(RecipeError, match="is a configuration of mergekit-evolve"):
        read_recipe(folder / "evolve.yml")
    with pytest.raises(ConfigError, match="not a mergekit-evolve configuration"):
        write_translated_config(folder / "again.yaml", folder / "search.yaml")
    with pytest.raises(ConfigError, match="already exists; choose another --out"):
        write_translated_config(folder / "search.yaml", folder / "evolve.yml")
