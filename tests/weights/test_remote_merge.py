"""Shards that each carry out a merge received as data together hold what a single merger writes."""

import pytest
import torch

from evomerge.core import RecipeError, canonical_json
from evomerge.engine import RemoteWrite
from evomerge.plan import Region, make_plan, read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import WRITE_MERGE, Merger, WeightPool

BY_COLUMN = ("o_proj", "down_proj")


class Shard:
    """What one of two processes of a tensor-parallel engine holds: a part of every parameter, but norms as a whole."""

    def __init__(self, plan, rank):
        self.parts = {}
        for step in plan.steps:
            index = [slice(0, size) for size in step.shape]
            if len(index) == 2:
                dimension = 1 if any(name in step.output for name in BY_COLUMN) else 0
                half = step.shape[dimension] // 2
                index[dimension] = slice(rank * half, (rank + 1) * half)
            shape = [part.stop - part.start for part in index]
            self.parts[step.output] = Region(tuple(index), torch.full(shape, torch.nan, dtype=torch.float32))

    def names(self):
        return list(self.parts)

    def regions(self, tensor):
        return [self.parts[tensor]]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "slerp"])
def test_shards_together_equal_the_whole_merge(tmp_path, method):
    paths = [str(write_tiny_llama(tmp_path / f"m{seed}", seed=seed, dtype="float32")) for seed in range(3)]
    base, a, b = paths
    if method == "slerp":
        recipe = Recipe("slerp", (Slice((Source(a),)),), base, {"t": (Setting(0.3),)})
    else:
        values = {"weight": (Setting(0.5),)} | ({} if method == "task_arithmetic" else {"density": (Setting(0.4),)})
        recipe = Recipe(method, (Slice((Source(a), Source(b))),), base, values)
    headers = {path: read_model_header(path) for path in paths}
    plan = make_plan(recipe, headers)
    whole = dict(Merger(WeightPool(headers)).tensors(plan))
    settings = {"recipe": recipe.to_json(), "models": {path: [path, None] for path in paths}}
    canonical_json(settings)  # must be serialisable
    for rank in range(2):
        shard = Shard(plan, rank)
        RemoteWrite(WRITE_MERGE, settings)(shard)
        for name, region in shard.parts.items():
            assert torch.equal(region.view, whole[name][region.index]), (rank, name)


def test_recipe_that_cannot_be_merged_raises_the_usual_error(tmp_path):
    path = str(write_tiny_llama(tmp_path / "m", seed=0))
    recipe = Recipe("linear", (Slice((Source("/nowhere", parameters={"weight": (Setting(1.0),)}),)),))
    with pytest.raises(RecipeError, match="nowhere"):
        RemoteWrite(WRITE_MERGE, {"recipe": recipe.to_json(), "models": {path: [path, None]}})(None)


def test_room_on_the_gpu_is_reported(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Merger, "write", lambda self, plan, target: told.append(self.gpu_bytes))
    path = str(write_tiny_llama(tmp_path / "m", seed=0))
    recipe = Recipe("linear", (Slice((Source(path, parameters={"weight": (Setting(1.0),)}),)),))
    shared = {"recipe": recipe.to_json(), "models": {path: [path, None]}}
    for room in ({}, {"gpu_bytes": None}, {"gpu_bytes": 7.0}):
        RemoteWrite(WRITE_MERGE, shared | room)(None)
    assert told == [None, None, 7.0]


@pytest.mark.parametrize(("said", "n_threads"), [("3", 3), ("", 1), ("0", 1), ("4,2", 1)])
def test_number_of_threads_comes_from_the_environment(tmp_path, monkeypatch, said, n_threads):
    """vLLM reduces torch's own number of threads."""
    counts = []
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(Merger, "write", lambda self, plan, target: counts.append(self._batch._threads.count))
    path = str(write_tiny_llama(tmp_path / "m", seed=0))
    recipe = Recipe("linear", (Slice((Source(path, parameters={"weight": (Setting(1.0),)}),)),))
    RemoteWrite(WRITE_MERGE, {"recipe": recipe.to_json(), "models": {path: [path, None]}})(None)
    assert counts == [n_threads]
