"""A search whose experts are LoRA adapters of one base, with small models and the light engine: search, resume, export, merge, score."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import evomerge
from evomerge.build.commands.starting import write_first_config
from evomerge.core import ConfigError, EvomergeError, Split
from evomerge.recipe import Recipe, recipe_to_yaml
from evomerge.recipe.mergekit_reader import recipe_from_mergekit
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task
from evomerge.weights import WeightPool

TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def write_adapter(folder: Path, model: Path, seed: int) -> None:
    """Writes an adapter of rank 4 in PEFT's format."""
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for target in TARGETS:
        n_out, n_in = weights[f"{target}.weight"].shape
        factors[f"base_model.model.{target}.lora_A.weight"] = 0.3 * torch.randn(4, n_in, generator=generator)
        factors[f"base_model.model.{target}.lora_B.weight"] = 0.3 * torch.randn(n_out, 4, generator=generator)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_tiny_llama(tmp_path / "base", seed=0, dtype="float32")
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / f"lora-{name}", tmp_path / "base", seed)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    return tmp_path


def configuration(folder: Path, **changes: object) -> Path:
    settings = {
        "models": {"base": "base", "experts": {"a": "base+lora-a", "b": {"path": "base", "lora": "lora-b"}}},
        "method": "ties",
        "tasks": ["toy.yaml"],
        "strategy": "random",
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local", "workers": 1},
        "budget": {"evaluations": 7},
        "finals": {"finalists": 1},
        **changes,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder / "search.yaml"


def test_a_search_over_adapters_from_start_to_checkpoint(project: Path) -> None:
    path, run = configuration(project), project / "run"
    state = evomerge.run_search(evomerge.load_config(path), run, config_text=path.read_text())
    assert {"source:base", "source:a", "source:b", "uniform"} <= set(state.entries)
    evomerge.resume_search(run, overrides=["budget.evaluations=9"])
    assert json.loads((run / "summary.json").read_text())["failed"] == 0
    evomerge.export_recipe(run, "id:source:a", project / "a.yaml")
    merged = load_file(evomerge.merge_recipe(project / "a.yaml", project / "a", dtype="float32") / "model.safetensors")
    base, factors = (
        load_file(project / file) for file in ("base/model.safetensors", "lora-a/adapter_model.safetensors")
    )
    for name, tensor in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            tensor = tensor + 2 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(merged[name], tensor)
    evomerge.export_recipe(run, "best", project / "best.yaml")
    config = evomerge.load_config(path)
    of_recipe = evomerge.evaluate_model(config, project / "best.yaml", Split.SEARCH)
    evomerge.merge_recipe(project / "best.yaml", project / "best")
    of_folder = evomerge.evaluate_model(config, project / "best", Split.SEARCH)
    assert of_recipe.evaluation.scores == of_folder.evaluation.scores
    write_adapter_again(project)
    with pytest.raises(ConfigError, match=r"changed since the run was started: models .*base\+.*lora-a"):
        evomerge.resume_search(run, overrides=["budget.evaluations=11"])


def write_adapter_again(project: Path) -> None:
    for file in (project / "lora-a").iterdir():
        file.unlink()
    (project / "lora-a").rmdir()
    write_adapter(project / "lora-a", project / "base", 77)


def test_crossovers_of_adapters_are_searched_exported_and_merged(project: Path) -> None:
    settings = configuration(project, strategy={"name": "m2n2", "population_size": 3})
    text = settings.read_text().replace("method: ties\n", "")
    settings.write_text(text)
    evomerge.run_search(evomerge.load_config(settings), project / "run", config_text=text)
    assert json.loads((project / "run" / "summary.json").read_text())["failed"] == 0
    evomerge.export_recipe(project / "run", "best", project / "best.yaml")
    assert (evomerge.merge_recipe(project / "best.yaml", project / "best") / "model.safetensors").exists()


def test_init_writes_a_configuration_with_adapters(project: Path) -> None:
    experts = [f"{project}/base+{project}/lora-a", f"second={project}/base+{project}/lora-b"]
    write_first_config(project / "first.yaml", experts, base=project / "base", tasks=[str(project / "toy.yaml")])
    config = evomerge.load_config(project / "first.yaml")
    assert {name: Path(model.lora).name for name, model in config.models.experts.items()} == {
        "lora-a": "lora-a",
        "second": "lora-b",
    }


def test_a_folder_with_a_plus_in_its_name_is_not_an_adapter(project: Path) -> None:
    (project / "base").rename(project / "ba+se")
    models = {"base": "ba+se", "experts": {"a": {"path": "ba+se", "lora": "lora-a"}, "b": "ba+se"}}
    problem = evomerge.make_problem(evomerge.load_config(configuration(project, models=models)))
    assert [header.adapter is None for header in problem.headers.values()] == [True, False]
    for baseline in problem.baselines():
        recipe = Recipe.from_json(baseline.recipe)
        assert {Path(source.model).name for piece in recipe.slices for source in piece.sources} == {"ba+se"}
        assert recipe_from_mergekit(yaml.safe_load(recipe_to_yaml(recipe)), "x").models() == recipe.models()


def test_experts_share_the_tensors_their_adapters_do_not_change(project: Path) -> None:
    problem = evomerge.make_problem(evomerge.load_config(configuration(project)))
    pool = WeightPool(problem.headers)
    for name in problem.headers[str(project / "base")].tensors:
        places = {pool.tensor(key, name).data_ptr() for key in problem.headers}
        assert len(places) == (3 if name.removesuffix(".weight") in TARGETS else 1), name


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            {"base": "base+lora-a", "experts": {"b": "base+lora-b"}},
            "has an adapter, but the base must be a plain model",
        ),
        ({"base": "base", "experts": {"a": "lora-a", "b": "base+lora-b"}}, "is a LoRA adapter, not a model"),
        ({"base": "base", "experts": {"a": "base+base", "b": "base+lora-b"}}, "is a model, not a LoRA adapter"),
        ({"base": "base", "experts": {"a": "base+gone", "b": "base+lora-b"}}, "no such adapter folder"),
    ],
)
def test_invalid_adapters_are_refused_at_validation(project: Path, models: object, message: str) -> None:
    with pytest.raises(EvomergeError) as caught:
        evomerge.make_problem(evomerge.load_config(configuration(project, models=models)))
    assert message in str(caught.value)


@pytest.mark.parametrize("setting", ["tokenizer: {source: union}", "chat_template: chatml"])
def test_eval_refuses_a_recipe_with_its_own_vocabulary_or_template(project: Path, setting: str) -> None:
    recipe = f"merge_method: linear\nmodels: [{{model: {project}/base, parameters: {{weight: 1}}}}]\n{setting}\n"
    (project / "r.yml").write_text(recipe)
    with pytest.raises(EvomergeError, match="write the merged model with `evomerge merge` and score its folder"):
        evomerge.evaluate_model(evomerge.load_config(configuration(project)), project / "r.yml")
