"""The pool refuses broken weights; the merger stores the values it yields, rounded once, in whatever views the engine provides."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import MergePlan, Region, TensorInput, TensorStep, make_plan, read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool
from evomerge.weights.merger import wait_for

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(write_tiny_llama(folder / f"m{seed}", seed=seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def pool(models):
    return WeightPool.from_folders(models)


def recipe_for(method, models, weight=0.5, **kwargs):
    base, a, b = models
    if method == "slerp":
        return Recipe("slerp", (Slice((Source(a),)),), base, {"t": (Setting(weight),)}, **kwargs)
    shared = {"weight": (Setting(weight),)}
    if method in ("ties", "dare_ties"):
        shared["density"] = (Setting(0.4),)
    return Recipe(method, (Slice((Source(a), Source(b))),), None if method == "linear" else base, shared, **kwargs)


class Target:
    """An engine's parameters: views of `dtype` that start as NaN, q/k/v fused and down_proj split by columns."""

    def __init__(self, plan, dtype):
        self.shapes = {step.output: step.shape for step in plan.steps}
        self.parameters = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in self.shapes.items()}

    def names(self):
        return list(self.shapes)

    def regions(self, tensor):
        view = self.parameters[tensor]
        if "down_proj" in tensor:
            half = view.shape[1] // 2
            return [
                Region((slice(None), slice(0, half)), view[:, :half]),
                Region((slice(None), slice(half, None)), view[:, half:]),
            ]
        if "q_proj" in tensor:
            half = view.shape[0] // 2
            return [Region((slice(0, half), slice(None)), view[:half]), Region((slice(half, None),), view[half:])]
        return [Region(tuple(slice(0, size) for size in view.shape), view)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("view_dtype", [torch.bfloat16, torch.float32])
def test_engine_holds_the_same_values_as_the_checkpoint(models, pool, method, out_dtype, view_dtype):
    plan = make_plan(recipe_for(method, models, out_dtype=out_dtype, seed=5), pool.headers)
    target = Target(plan, view_dtype)
    merger = Merger(pool)
    merger.write(plan, target)
    for name, tensor in merger.tensors(plan):
        assert (
            tensor.dtype == {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}[out_dtype]
        )
        assert torch.equal(target.parameters[name], tensor.to(view_dtype)), name


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_merging_identical_models_is_the_identity(models, pool, method):
    base = models[0]
    keys = [base, base + "/", base + "/."]
    pool = WeightPool(dict.fromkeys(keys, pool.headers[base]))
    plan = make_plan(recipe_for(method, keys), pool.headers)
    for name, tensor in Merger(pool).tensors(plan):
        assert torch.equal(tensor, pool.tensor(base, name)), name


def test_weight_of_one_gives_the_expert(models, pool):
    base, expert, _ = models
    recipe = Recipe("task_arithmetic", (Slice((Source(expert),)),), base, {"weight": (Setting(1.0),)})
    for name, tensor in Merger(pool).tensors(make_plan(recipe, pool.headers)):
        # base + (expert - base) loses an expert's smallest values if the base is large
        torch.testing.assert_close(tensor, pool.tensor(expert, name), rtol=0, atol=1e-6, msg=name)


def test_random_masks_follow_the_seed(models, pool):
    def merge(seed):
        plan = make_plan(recipe_for("dare_ties", models, seed=seed), pool.headers)
        return dict(Merger(pool).tensors(plan))

    first, again, other = merge(1), merge(1), merge(2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_target_with_an_unknown_tensor_is_refused(models, pool):
    plan = make_plan(recipe_for("linear", models), pool.headers)
    target = Target(plan, torch.float32)
    target.shapes["model.unknown.weight"] = (2, 2)
    with pytest.raises(RecipeError, match=r"model\.unknown\.weight"):
        Merger(pool).write(plan, target)


def test_changed_shapes_and_regions_are_noticed():
    pool = WeightPool.holding({("m", "a"): torch.arange(6.0)})
    view = torch.zeros(6)

    def plan(*shape):
        step = TensorStep("w", shape, "linear", (TensorInput("m", "a", {"weight": 1.0}),), None, {"normalize": True})
        return MergePlan((step,), 0, 0, "float32", "float32", 0)

    class Regions:
        def __init__(self):
            self.region = Region((slice(0, 6),), view)

        def names(self):
            return ["w"]

        def regions(self, tensor):
            return [self.region]

    target, merger = Regions(), Merger(pool)
    for _ in range(2):
        merger.write(plan(6), target)
        assert torch.equal(view, torch.arange(6.0))
    with pytest.raises(RecipeError, match="the merge gives shape"):
        merger.write(plan(2, 3), target)
    merger.write(plan(6), target)
    part = torch.zeros(2)
    target.region = Region((slice(3, 5),), part)
    merger.write(plan(6), target)
    assert part.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_overflow_is_named(models, pool, method, out_dtype):
    weight = 1e6 if out_dtype == "float16" else 1e39
    recipe = recipe_for(method, models, weight, out_dtype=out_dtype)
    if method == "linear":
        recipe = Recipe(
            method, recipe.slices, None, {**recipe.parameters, "normalize": (Setting(False),)}, out_dtype=out_dtype
        )
    plan = make_plan(recipe, pool.headers)
    with pytest.raises(CheckpointError, match=f"merged tensor .*{out_dtype}"):
        list(Merger(pool).tensors(plan))
    with pytest.raises(CheckpointError, match=f"merged tensor .*{out_dtype}"):
        Merger(pool).write(plan, Target(plan, torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_broken_source_weights_are_named(tmp_path, bad, dtype):
    folder = write_tiny_llama(tmp_path / "m", seed=1, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.* flat index 100"):
        WeightPool.from_folders([str(folder)])


def test_pool_names_missing_models_and_tensors(models, pool):
    with pytest.raises(CheckpointError, match="no model 'x'"):
        pool.tensor("x", "y")
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        pool.tensor(models[0], "y")


def test_changed_files_are_noticed(tmp_path):
    folder = write_tiny_llama(tmp_path / "m", seed=1)
    header = read_model_header(folder)
    write_tiny_llama(tmp_path / "m", seed=2)
    with pytest.raises(CheckpointError, match="changed since"):
        WeightPool({str(folder): header})


def test_integer_buffers_and_unaligned_tensors_are_read(tmp_path):
    models = []
    for seed in range(3):
        folder = write_tiny_llama(tmp_path / f"m{seed}", seed=seed)
        tensors = load_file(folder / "model.safetensors")
        tensors["a.flag"] = torch.tensor([True, False, True])  # three bytes: everything after it is unaligned
        tensors["a.steps"] = torch.tensor([1, 2, 3])
        tensors["a.none"] = torch.empty(0, 4)
        save_unaligned(tensors, folder / "model.safetensors")
        models.append(str(folder))
    pool = WeightPool.from_folders(models)
    merged = dict(Merger(pool).tensors(make_plan(recipe_for("ties", models), pool.headers)))
    assert merged["a.flag"].tolist() == [True, False, True]
    assert merged["a.steps"].tolist() == [1, 2, 3]
    assert merged["a.none"].shape == (0, 4)


def save_unaligned(tensors, path):
    """safetensors sorts by alignment; other writers may not."""
    import json

    names = {torch.bool: "BOOL", torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16"}
    header, data = {}, b""
    for name in sorted(tensors):
        part = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_write_waits_for_the_engine_before_and_for_the_gpu_after(models, pool, monkeypatch):
    plan = make_plan(recipe_for("linear", models), pool.headers)
    target = Target(plan, torch.bfloat16)
    written = []

    def look(devices):
        assert list(devices) == [torch.device("cpu")]
        written.append([not view.isnan().any() for view in target.parameters.values()])

    monkeypatch.setattr("evomerge.weights.merger.wait_for", look)
    Merger(pool).write(plan, target)
    before, after = written
    assert not any(before)
    assert all(after)


def test_only_gpus_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    wait_for([gpus[0], torch.device("cpu"), gpus[1]])
    assert waited == gpus
