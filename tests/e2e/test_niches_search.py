"""Natural niches on the demo models, end to end in this process: search, resume, export, merge, and the weights to expect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.build import load_config, make_problem, open_run, start_search
from evomerge.build.commands.reading import export_recipe
from evomerge.build.commands.runs import resume_search
from evomerge.core import CrossoverGenome, VectorGenome
from evomerge.recipe import recipe_file_from_yaml, slerp_factors
from evomerge.weights import merge_to_folder

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = ("largest", "reverse", "translate")
N_EVALUATIONS = 20


@pytest.fixture(scope="module")
def config_path(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`configs/niches.yaml` with fewer items and candidates and a small archive, in one process."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "niches.yaml").read_text())
    settings["models"]["experts"] = {name: str(zoo / name) for name in EXPERTS}
    settings["tasks"] = [{"task": str(ROOT / "configs" / task), "limit": 12} for task in settings["tasks"]]
    settings["strategy"] = {"name": "m2n2", "population_size": 5}
    settings["engine"]["kind"] = "transformers"
    settings["cluster"] = {"kind": "local"}
    settings["budget"] = {"evaluations": N_EVALUATIONS}
    settings["finals"] = {"finalists": 1}
    settings["deterministic"] = True
    path = tmp_path_factory.mktemp("niches") / "search.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run(config_path: Path) -> Path:
    """A run that was stopped half-way and resumed."""
    folder = config_path.parent / "run"
    short = load_config(config_path, ["budget.evaluations=11"])
    start_search(short, folder, config_text=config_path.read_text())
    resume_search(folder, overrides=[f"budget.evaluations={N_EVALUATIONS}"])
    return folder


def test_a_resumed_run_equals_an_undisturbed_run(config_path: Path, run: Path) -> None:
    whole = config_path.parent / "whole"
    start_search(load_config(config_path), whole, config_text=config_path.read_text())
    first, second = (open_run(folder).state for folder in (run, whole))
    assert [entry.candidate() for entry in first.proposed] == [entry.candidate() for entry in second.proposed]
    assert (run / "front.json").read_bytes() == (whole / "front.json").read_bytes()
    assert all(isinstance(entry.genome, CrossoverGenome) for entry in first.proposed)
    events = [json.loads(line[9:]) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert all(item["values"] is None and item["crossover"] for item in events if item["event"] == "asked")


def test_the_exported_file_merges_to_the_explicit_crossover(zoo: Path, run: Path, tmp_path: Path) -> None:
    """The youngest candidate, rebuilt from its ancestors as float64 weight vectors."""
    state = open_run(run).state
    youngest = state.proposed[-1].id
    _, recipe, path = export_recipe(run, f"id:{youngest}", tmp_path / "recipe.yaml")
    assert recipe_file_from_yaml(path.read_text()).final == recipe
    assert recipe.pieces is not None
    assert recipe.pieces.splits_tensors
    merge_to_folder(recipe, tmp_path / "merged", dtype="float32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    groups = make_problem(open_run(run).config).crossings
    assert groups is not None
    seeds = [load_file(zoo / name / "model.safetensors") for name in EXPERTS]

    def flat(tensors: dict[str, torch.Tensor], chromosome: int) -> np.ndarray:
        names = [name for name, _ in groups.layout.chromosomes[chromosome]]
        return torch.cat([tensors[name].double().reshape(-1) for name in names]).numpy()

    def explicit(name: str) -> list[np.ndarray]:
        genome = state.entries[name].genome
        if isinstance(genome, VectorGenome):
            return [flat(seeds[int(np.argmax(genome.values))], index) for index in range(2)]
        assert isinstance(genome, CrossoverGenome)
        a, b = (explicit(parent) for parent in genome.parents)
        whole_a, whole_b = np.concatenate(a), np.concatenate(b)
        products = (whole_a @ whole_a, whole_b @ whole_b, whole_a @ whole_b)
        left, right = (slerp_factors(share, *products) for share in (genome.mix, 1 - genome.mix))
        children = []
        for part_a, part_b, split in zip(a, b, genome.splits, strict=True):
            is_left = np.arange(len(part_a)) < int(split * len(part_a))
            children.append(
                np.where(is_left, left[0] * part_a + left[1] * part_b, right[0] * part_a + right[1] * part_b)
            )
        return children

    wanted = np.concatenate(explicit(youngest))
    got = np.concatenate([flat(merged, index) for index in range(2)])
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)
