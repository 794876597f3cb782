"""Checkpoints whose numbers or structure cannot be merged, classes 1 to 14; test_checkpoint_files.py has the others and checks
that every class has a test.

If a class is an error, it is tested through `evomerge merge`: exit code 2, one message, no traceback, nothing left behind; and, if
metadata shows it, before any weight is read.
"""

import json
import shutil

import pytest
import torch
from checkpoints import EMBEDDING, UP, WEIGHTS, configure, edit, recipe_of, run_merge
from safetensors.torch import load_file

import evomerge
from evomerge.config import parse_config
from evomerge.core import CheckpointError
from evomerge.plan import MergePlan, TensorInput, TensorStep
from evomerge.recipe import METHODS, BaseRole
from evomerge.search import read_journal
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task
from evomerge.weights import Merger, WeightPool


def test_1_nan(models, refused):
    edit(models / "a", lambda tensors: tensors[UP].view(-1).__setitem__(100, torch.nan))
    refused("/a", UP, "nan at flat index 100", "download it again", reads_weights=True)
    with pytest.raises(CheckpointError, match="flat index 100"):
        WeightPool.from_folders([str(models / "a")])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_2_infinities(models, refused, bad):
    edit(models / "b", lambda tensors: tensors[UP].view(-1).__setitem__(7, bad))
    refused("/b", UP, "inf at flat index 7", reads_weights=True)


@pytest.mark.parametrize(("dtype", "weight"), [("float16", 1e6), ("bfloat16", 1e39), ("float32", 1e39)])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "model_stock"])
def test_3_a_result_that_overflows(models, refused, dtype, weight, method):
    recipe = recipe_of(method, weight, out_dtype=dtype)
    if method == "model_stock":  # it has no weights that could be too large, so the models' values are
        recipe["models"] = [{"model": name} for name in "ab"]
        for name in "ab":
            edit(models / name, lambda tensors: tensors[UP].fill_(3e38))
        recipe["out_dtype"] = "bfloat16" if dtype == "float32" else dtype
        edit(models / "base", lambda tensors: tensors[UP].fill_(-3e38))
    if method == "linear":
        recipe["parameters"] = {"normalize": False}
    refused("merged tensor", "outside the range of", "out_dtype", recipe=recipe, reads_weights=True)


def test_3_a_candidate_that_overflows_fails_and_the_run_continues(models):
    write_toy_task(models / "toy.yaml", n_items=3)
    settings = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "space": {"method": "task_arithmetic", "parameters": {"weight": {"low": 0, "high": 1e6}}, "out_dtype": "float16"},
        "tasks": ["toy.yaml"], "strategy": "random", "engine": {"kind": "transformers"},
        "cluster": {"kind": "local", "workers": 1}, "budget": {"evaluations": 9}, "finals": {"finalists": 0},
    }  # fmt: skip
    evomerge.run_search(parse_config(settings, folder=models), models / "run")
    found = [record for record in read_journal(models / "run" / "journal.jsonl") if record["event"] == "evaluated"]
    failed = [record["error"] for record in found if record["status"] == "failed"]
    assert len(found) == 9
    assert 1 <= len(failed) < 9
    assert all("contains values outside the range of float16" in error for error in failed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_4_denormals_are_handled_like_other_numbers(dtype, fused):
    """The smallest numbers of the dtype are kept bit for bit, ordered by magnitude, and never flushed to zero."""
    smallest = torch.arange(1, 65, dtype=torch.int32 if dtype is torch.float32 else torch.int16).view(dtype)
    zero = torch.zeros_like(smallest)
    pool = WeightPool.holding({("base", "w"): zero, ("m", "w"): smallest, ("n", "w"): smallest})
    for method, parameters in (("linear", {}), ("task_arithmetic", {}), ("ties", {"density": 0.25})):
        merged = merge_one(pool, method, ("m",), {"weight": 1.0, **parameters}, dtype, fused)
        expected = torch.where(torch.arange(64) >= 48, smallest, zero) if method == "ties" else smallest
        assert torch.equal(merged, expected), method
    assert torch.equal(merge_one(pool, "linear", ("m", "n"), {}, dtype, fused), smallest)


def merge_one(pool, method, models, parameters, dtype, fused=True):
    """The merged tensor `w`."""
    spec = METHODS[method]
    inputs = tuple(TensorInput(name, "w", {"weight": 1.0, **defaults(method), **parameters}) for name in models)
    base = None if spec.base is BaseRole.SOURCE else TensorInput("base", "w", {})
    shape = tuple(pool.tensor(models[0], "w").shape)
    step = TensorStep("w", shape, method, inputs, base, {"t": 0.4, **defaults(method)})
    plan = MergePlan((step,), 0, 0, str(dtype).removeprefix("torch."), "float32", 0)
    return next(Merger(pool, fused=fused).tensors(plan))[1]


def defaults(method):
    return {spec.name: spec.default for spec in METHODS[method].parameters if spec.default is not None}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("fused", [True, False])
def test_5_a_zero_delta(method, fused):
    """With experts equal to their base the merge is the base; with one that differs it is still finite."""
    spec = METHODS[method]
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    pool = WeightPool.holding({(name, "w"): base.clone() for name in ("base", "m", "n")} | {("x", "w"): base * 1.5})
    second = () if spec.max_sources == 1 else ("n",)
    density = {"density": 0.5, "epsilon": 0.1} if any(p.name == "density" for p in spec.parameters) else {}
    merged = merge_one(pool, method, ("m", *second), density, torch.float32, fused)
    torch.testing.assert_close(merged, base, rtol=1e-6, atol=1e-6)
    if second:
        assert merge_one(pool, method, ("m", "x"), density, torch.float32, fused).isfinite().all()


def test_6_different_shapes(models, refused):
    shutil.rmtree(models / "a")
    write_tiny_llama(models / "a", seed=1, dtype="float32", intermediate_size=96)
    refused("mlp", "shape", "/a", "only tensors of equal shape can be merged")


def test_7_different_layer_counts(models, refused):
    write_tiny_llama(models / "a", seed=1, dtype="float32", n_layers=3)
    refused("/a has 3 layers", "/base has 2")


def test_8_different_vocabulary_sizes(models, refused):
    write_tiny_llama(models / "a", seed=1, dtype="float32", vocab=144)
    refused("/a has 144 embedding rows", "/base has 128", "tokenizer: {source: union}")


def test_9_vocabulary_padding_is_kept(models, monkeypatch):
    """With more rows than tokens, the rows after the last token are merged like the others."""
    rows = load_file(models / "a" / WEIGHTS)[EMBEDDING].shape[0]
    tokens = json.loads((models / "a" / "tokenizer.json").read_text())["model"]["vocab"]
    assert rows > len(tokens)
    run_merge(models, monkeypatch, recipe_of("linear"))
    a, b, merged = (load_file(models / name / WEIGHTS)[EMBEDDING] for name in ("a", "b", "out"))
    torch.testing.assert_close(merged, (a + b) / 2)


def test_10_added_tokens_in_one_source(models, refused, monkeypatch):
    def add_row(tensors):
        tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.ones(1, 32)])

    edit(models / "b", add_row)
    configure(models / "b", vocab_size=129)
    refused("/b has 129 embedding rows", "added tokens", "tokenizer: {source: union}")
    run_merge(models, monkeypatch, recipe_of(tokenizer={"source": "union"}))
    assert (models / "out" / "tokenizer.json").exists()


def test_11_tied_and_untied_output_layers(models, refused, monkeypatch):
    write_tiny_llama(models / "a", seed=1, dtype="float32", tied=False)
    refused("/a has a separate output layer (lm_head.weight)", "/base ties it to the embedding", "untied model")
    write_tiny_llama(models / "base", seed=0, dtype="float32", tied=False)
    run_merge(models, monkeypatch, recipe_of())  # the tied expert's embedding serves as its output layer
    merged, base, a, b = (load_file(models / name / WEIGHTS) for name in ("out", "base", "a", "b"))
    head = base["lm_head.weight"]
    expected = head + 0.5 * (a["lm_head.weight"] - head) + 0.5 * (b[EMBEDDING] - head)
    torch.testing.assert_close(merged["lm_head.weight"], expected)


def test_12_no_output_layer(models, refused):
    for name in ("base", "a", "b"):
        configure(models / name, tie_word_embeddings=False)
    refused("/base", "no lm_head.weight", "tie_word_embeddings")


def test_13_an_extra_tensor(models, refused):
    edit(models / "a", lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    refused("/a has a tensor 'model.extra.weight'", "/base lacks")


def test_14_a_missing_tensor(models, refused):
    edit(models / "a", lambda tensors: tensors.pop(UP))
    refused(f"/a has no tensor '{UP}'", "is its download complete?")
