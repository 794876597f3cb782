"""Weights read back from a running engine equal, byte for byte, the checkpoint that `evomerge merge` writes for the same recipe."""

import pytest
import torch
from safetensors.torch import load_file

from evomerge.engine import RemoteWrite, make_engine
from evomerge.engine.environment import vllm_targets_cpu
from evomerge.plan import make_plan, read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.engines import cannot_start, options_beside_others
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import WRITE_MERGE, Merger, WeightPool, merge_to_folder

pytestmark = [] if vllm_targets_cpu() else [pytest.mark.gpu]

GRADIENT = (Setting((0.1, 0.9)),)


def ties(base, *experts):
    """With gradients over depth, and a different value for one module."""
    weights = ({"weight": (Setting(1.0, "mlp"), *GRADIENT)}, {"weight": (Setting(0.7),)})
    sources = tuple(Source(expert, None, own) for expert, own in zip(experts, weights, strict=True))
    return Recipe("ties", (Slice(sources),), base, {"density": (Setting((0.9, 0.2)),), "lambda": (Setting(0.8),)})


def of_two(method, **parameters):
    def make(base, *experts):
        shared = {"weight": GRADIENT} | {name: (Setting(value),) for name, value in parameters.items()}
        return Recipe(method, (Slice(tuple(Source(expert) for expert in experts)),), base, shared, seed=7)

    return make


def slerp(base, expert, _):
    shared = {"t": (Setting((0.0, 0.5, 1.0), "self_attn"), Setting(0.4))}
    return Recipe("slerp", (Slice((Source(expert),)),), base, shared)


def model_stock(base, *experts):
    """A method without a compiled kernel."""
    return Recipe("model_stock", (Slice(tuple(Source(expert) for expert in experts)),), base)


RECIPES = {
    "ties": ties,
    "dare_ties": of_two("dare_ties", density=0.4),
    "della": of_two("della", density=0.5, epsilon=0.1),
    "breadcrumbs": of_two("breadcrumbs", density=0.6, gamma=0.05),
    "task_arithmetic": of_two("task_arithmetic"),
    "linear": of_two("linear"),
    "slerp": slerp,
    "model_stock": model_stock,
}


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def assert_holds(engine, checkpoint):
    """The engine's parameters are exactly the checkpoint's tensors."""
    targets = []
    engine.update(targets.append)
    (target,) = targets
    assert set(target.names()) == set(checkpoint)
    for name in target.names():
        held = 0
        for region in target.regions(name):
            expected = checkpoint[name][region.index].to(region.view.dtype)
            assert torch.equal(bits(region.view), bits(expected)), name
            held += region.view.numel()
        assert held == checkpoint[name].numel()


def exported(recipe, folder):
    merge_to_folder(recipe, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("engine", ["transformers-tied", "transformers-untied", "vllm-tied", "vllm-untied"])
def test_every_live_tensor_equals_the_export(suite_of, engine, method, tmp_path):
    suite = suite_of(engine)
    headers = {str(folder): read_model_header(folder) for folder in suite.folders}
    recipe = RECIPES[method](*headers)
    merger = Merger(WeightPool(headers))
    suite.engine.update(lambda target: merger.write(make_plan(recipe, headers), target))
    assert_holds(suite.engine, exported(recipe, tmp_path / "merged"))


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_live_bfloat16_tensors_equal_the_export(kind, tmp_path):
    if cannot_start(kind):
        pytest.skip(cannot_start(kind))
    folders = [str(write_tiny_llama(tmp_path / name, seed=i, hidden=128, vocab=99)) for i, name in enumerate("abc")]
    headers = {folder: read_model_header(folder) for folder in folders}
    merger = Merger(WeightPool(headers))
    options = {"kv_cache_memory_bytes": 16 << 20} if kind == "vllm" else {}
    options |= options_beside_others(kind)
    engine = make_engine(kind, tmp_path / "a", dtype="bfloat16", max_model_len=64, options=options)
    for method in ("ties", "dare_ties", "linear"):
        recipe = RECIPES[method](*folders)
        plan = make_plan(recipe, headers)
        engine.update(lambda target, plan=plan: merger.write(plan, target))
        assert_holds(engine, exported(recipe, tmp_path / method))
    engine.close()


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_tied_merge_in_an_engine_with_a_separate_output_layer(kind, tmp_path):
    """Candidates without the base are tied, like the experts; the base, for which the engine was started, is not."""
    if cannot_start(kind):
        pytest.skip(cannot_start(kind))
    for seed, name in enumerate("abc"):
        write_tiny_llama(tmp_path / name, seed=seed, hidden=128, vocab=99, tied=name != "a")
    headers = {str(tmp_path / name): read_model_header(tmp_path / name) for name in "abc"}
    merger = Merger(WeightPool(headers))
    options = {"kv_cache_memory_bytes": 16 << 20} if kind == "vllm" else {}
    options |= options_beside_others(kind)
    engine = make_engine(kind, tmp_path / "a", dtype="bfloat16", max_model_len=64, options=options)
    base, *experts = headers
    for recipe, tied in ((ties(base, *experts), False), (of_two("linear")(None, *experts), True)):
        engine.update(lambda target, recipe=recipe: merger.write(make_plan(recipe, headers), target))
        checkpoint = exported(recipe, tmp_path / recipe.method)
        assert ("lm_head.weight" not in checkpoint) == tied
        assert_holds(engine, {"lm_head.weight": checkpoint["model.embed_tokens.weight"], **checkpoint})
    engine.close()


def test_shards_in_separate_processes_equal_the_export(suite_of, tmp_path):
    suite = suite_of("vllm-untied-sharded")
    folders = [str(folder) for folder in suite.folders]
    recipe = RECIPES["dare_ties"](*folders)
    exported(recipe, tmp_path / "merged")
    settings = {"recipe": recipe.to_json(), "models": {folder: [folder, None] for folder in folders}}
    suite.engine.update(RemoteWrite(WRITE_MERGE, settings))
    check = "evomerge.testing.engine_writers:check_file"
    suite.engine.update(RemoteWrite(check, {"file": str(tmp_path / "merged" / "model.safetensors")}))
