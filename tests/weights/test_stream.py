"""Merging from files gives the same result as merging in memory, even in parts and with little memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import make_plan, read_headers
from evomerge.recipe import recipe_file_from_yaml
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool
from evomerge.weights.checkpoint import stream
from evomerge.weights.checkpoint.stream import StreamedMerge

PART = 1000
"""elements: no multiple of a row of any tensor"""


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, dtype="float32" if name == "b" else "bfloat16")
    return tmp_path


def planned(models, method):
    base = "" if method == "linear" else f"base_model: {models}/base\n"
    weight = "" if method == "ram" else ", parameters: {weight: 0.4}"
    listed = "".join(f"- {{model: {models}/{name}{weight}}}\n" for name in "ab")
    recipe = recipe_file_from_yaml(
        f"merge_method: {method}\n{base}models:\n{listed}dtype: float32\nout_dtype: bfloat16\n"
    ).final
    headers = read_headers(recipe)
    return headers, make_plan(recipe, headers)


@pytest.mark.parametrize("max_bytes", [None, 200_000])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ram", "ties"])
def test_parts_add_up_to_the_whole_tensor(models, monkeypatch, method, max_bytes):
    monkeypatch.setattr(stream, "_PART_ELEMENTS", PART)
    headers, plan = planned(models, method)
    if method == "ties":
        max_bytes = None  # whole tensors
    parts = {}
    for name, part in StreamedMerge(headers, max_bytes=max_bytes).parts(plan):
        parts.setdefault(name, []).append(part.clone())
    assert (max(map(len, parts.values())) > 1) == (method != "ties")
    whole = dict(Merger(WeightPool(headers)).tensors(plan))
    assert list(parts) == list(whole)
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part.reshape(-1) for part in parts[name]]), tensor.reshape(-1)), name


def test_position_of_a_bad_element_refers_to_the_whole_tensor(models, monkeypatch):
    monkeypatch.setattr(stream, "_PART_ELEMENTS", PART)
    file = models / "a" / "model.safetensors"
    weights = load_file(file)
    name = max(weights, key=lambda key: weights[key].numel())
    weights[name].view(-1)[PART + 17] = float("nan")
    save_file(weights, file)
    headers, plan = planned(models, "linear")
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' contains nan at flat index {PART + 17};"):
        list(StreamedMerge(headers).parts(plan))


def test_part_too_large_for_the_memory_is_refused(models):
    headers, plan = planned(models, "linear")
    with pytest.raises(RecipeError, match=r"max-memory is 100 bytes, but merging .* needs about"):
        next(StreamedMerge(headers, max_bytes=100).parts(plan))


def test_dtypes_without_kernels_need_more_memory(models):
    """float64 is merged in plain torch, which holds float32 copies and intermediate results."""
    for name in ("base", "a", "b"):
        file = models / name / "model.safetensors"
        save_file({key: tensor.double() for key, tensor in load_file(file).items()}, file)
    headers, plan = planned(models, "linear")
    n_elements = max(step.n_elements for step in plan.steps)
    sources_and_result = (2 * 8 + 4) * n_elements
    with pytest.raises(RecipeError, match="needs about"):
        next(StreamedMerge(headers, max_bytes=sources_and_result).parts(plan))
