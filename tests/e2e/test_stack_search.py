"""A search over layer stacks as a user runs it, with small models and the light engine: search, resume, export, merge, score."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacks")
    for seed, name in enumerate(("base", "b", "a")):
        write_tiny_llama(folder / name, seed=seed, n_layers=3)
    write_tiny_llama(folder / "wide", seed=5, n_layers=3, hidden=64)
    write_tiny_llama(folder / "deep", seed=6, n_layers=5)
    write_toy_task(folder / "toy.yaml", n_items=6)
    return folder


def configuration(folder: Path, stacking: dict[str, object], **space: object) -> Path:
    settings = {
        "models": {"base": "base", "experts": {"b": "b", "a": "a"}},
        "space": {"stacking": stacking, **space},
        "tasks": ["toy.yaml"],
        "objectives": ["toy", "cost.layers"],
        "strategy": "ga",
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local", "workers": 1},
        "budget": {"evaluations": 14},
        "finals": {"finalists": 2},
        "deterministic": True,
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_a_search_over_merged_stacks_from_start_to_checkpoint(project: Path, tmp_path: Path) -> None:
    config = configuration(
        project,
        {"parameters": True, "encoding": "categorical", "models": ["merged", "b"], "max_depth": 5, "fixed_last": 0},
        method="task_arithmetic",
    )
    searched = run("search", config, "--run-dir", tmp_path / "run")
    assert searched.returncode == 0, searched.stdout + searched.stderr
    resumed = run("resume", tmp_path / "run", "--set", "budget.evaluations=18")
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["evaluations"], summary["failed"]) == (18, 0)
    deepest = max(member["scores"]["cost.layers"] for member in summary["front"])
    assert 1 <= deepest <= 5
    assert run("export", tmp_path / "run", "--pick", "id:c000005", "-o", tmp_path / "stack.yaml").returncode == 0
    merged = run("merge", tmp_path / "stack.yaml", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.num_hidden_layers == len(model.model.layers)
    scores = []
    for path in ("merged", "stack.yaml"):
        scored = run("eval", tmp_path / path, "--config", tmp_path / "run", "--split", "search", "--json")
        assert scored.returncode == 0, scored.stderr
        scores.append(json.loads(scored.stdout)["scores"])
    journal = [json.loads(line[9:]) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    told = next(
        event
        for event in journal
        if event["event"] == "evaluated" and (event["id"], event["split"]) == ("c000005", "search")
    )
    assert scores == [{"toy": told["scores"]["toy"]}] * 2, (
        "the exported and the merged stack should score as the candidate did"
    )
    assert told["cost"]["layers"] == model.config.num_hidden_layers
    assert told["cost"]["active_parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stacking", "space", "message"),
    [
        ({"models": ["c"]}, {}, "no model is called c; known: b, a, base"),
        ({"models": ["merged"]}, {}, "set stacking.parameters: true"),
        ({"models": {"a": [0, 9]}}, {}, "[0, 9] must be a range within its 3 layers"),
        ({"ends": "base"}, {}, "'base' is not one of the stacked models"),
        ({"models": []}, {}, "name at least one model"),
        ({"models": [["a", "b"]]}, {}, "space.stacking.models"),
        ({"models": {"a": [2, 2]}}, {}, "[2, 2] must be a range within its 3 layers"),
        ({"models": {"a": [2, 1]}}, {}, "[2, 1] must be a range within its 3 layers"),
        ({"max_depth": 1}, {}, "fixed layers (2) <= min_depth (2) <= max_depth (1)"),
        ({"max_depth": 0}, {}, "max_depth"),
        ({"min_depth": 4, "max_depth": 6}, {}, "min_depth: 4 is more than the 3 layers"),
        ({"fixed_first": 2, "fixed_last": 2}, {}, "are more than the 3 layers"),
        ({"encoding": "swap", "max_depth": 4}, {}, "encoding swap keeps the depth"),
        ({"encoding": "moves", "repeats": 3}, {}, "repeats is an option of encoding indicator"),
        ({"encoding": "swap", "scales": "matrix"}, {}, "scales: matrix needs encoding indicator"),
        ({"scale_low": 1.5}, {}, "must be positive and include 1"),
        ({"scale_low": 0}, {}, "scale_low"),
        ({"scale_low": 0.5, "max_depth": 70}, {}, "bfloat16 has room for 2^48; use at least 0.618"),
        ({"scale_low": 0.5, "max_depth": 20}, {"out_dtype": "float16"}, "float16 has room for 2^10"),
        ({}, {"layer_groups": 3}, "layer_groups would have no effect"),
        ({"parameters": True}, {"method": "ties"}, "layers merged by 'ties' cannot be stacked in the same search"),
        ({"parameters": True}, {"method": "linear"}, "set space.fixed.normalize: false"),
        ({"encodng": "swap"}, {}, "did you mean 'encoding'"),
    ],
)
def test_invalid_stacking_settings_are_refused_at_validation(
    project: Path, stacking: dict[str, object], space: dict[str, object], message: str
) -> None:
    from evomerge import EvomergeError, load_config, make_problem

    with pytest.raises(EvomergeError) as caught:
        make_problem(load_config(configuration(project, stacking, **space)))
    assert message in str(caught.value)


def test_an_expert_may_not_have_the_name_of_the_merge(project: Path) -> None:
    from evomerge import EvomergeError, load_config, make_problem

    config = configuration(project, {"parameters": True}, method="task_arithmetic")
    config.write_text(config.read_text().replace("a: a", "merged: a"))
    with pytest.raises(EvomergeError, match=r"models\.experts\.merged: .* rename the expert"):
        make_problem(load_config(config))


def test_models_of_different_sizes_cannot_be_stacked(project: Path) -> None:
    from evomerge import EvomergeError, load_config, make_problem

    config = configuration(project, {})
    config.write_text(config.read_text().replace("a: a", "a: wide"))
    with pytest.raises(EvomergeError, match="hidden_size = 64"):
        make_problem(load_config(config))


def test_models_of_different_depth_can_be_stacked_but_not_merged(project: Path, tmp_path: Path) -> None:
    """Their layers are stacked, and each model alone is a baseline; whatever needs equal depth is refused."""
    from evomerge import EvomergeError, load_config, make_problem, run_search

    def deeper(stacking: dict[str, object], **space: object) -> Path:
        config = configuration(project, stacking, **space)
        config.write_text(config.read_text().replace("a: a", "a: deep").replace("evaluations: 14", "evaluations: 9"))
        return config

    config = load_config(deeper({"ends": "b", "max_depth": 4, "encoding": "categorical"}))
    problem = make_problem(config)
    assert problem.max_slots == 5
    assert [baseline.id for baseline in problem.baselines()] == ["source:base", "source:b", "source:a"]
    assert "a.4" in problem.space.parameters[0].choices
    state = run_search(config, tmp_path / "run")
    layers = [item.cost["layers"] for item in state.evaluated()]
    assert layers[:3] == [3.0, 3.0, 5.0]
    assert len(layers) == 9
    assert max(layers[3:]) <= 4
    for settings, message in (
        ({"encoding": "swap"}, "needs models of equal depth; b has 3, a has 5"),
        (
            {"parameters": True},
            "only models of the same depth can be merged; b has 3 layers, a has 5 layers, base has 3",
        ),
        ({"models": {"b": [0, 5]}}, "[0, 5] must be a range within its 3 layers"),
    ):
        with pytest.raises(EvomergeError) as caught:
            make_problem(
                load_config(deeper(settings, **({"method": "task_arithmetic"} if "parameters" in settings else {})))
            )
        assert message in str(caught.value)


def test_bounds_of_scales_depend_on_the_depth_by_default(project: Path) -> None:
    from evomerge import load_config, make_problem

    for max_depth, low, high in ((40, 0.5, 2.0), (150, 2 ** (-48 / 149), 2 ** (126 / 149))):
        space = make_problem(load_config(configuration(project, {"max_depth": max_depth}))).space
        scale = next(parameter for parameter in space.parameters if not parameter.choices)
        assert math.exp(scale.low) == pytest.approx(low)
        assert math.exp(scale.high) == pytest.approx(high)
