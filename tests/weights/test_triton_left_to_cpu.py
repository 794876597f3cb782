"""If the GPU has no kernels, room or compiler for a merge, the CPU computes it, the result is copied, and a message says so; run like test_triton_kernels.py."""

import logging
import os
import sys
import weakref

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton stays out of this environment; `make triton-test` runs this")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here only under TRITON_INTERPRET=1: `make triton-test`", allow_module_level=True)

from fused_cases import Views, fixed_case
from triton_cases import della_case, ties_plan, two_tensors, written

from evomerge.plan import MergePlan, TensorInput, TensorStep
from evomerge.weights import Merger, WeightPool, gpu_methods
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import CPU_ONLY, fuse
from evomerge.weights.triton import missing
from evomerge.weights.triton.batch import MAX_INPUTS, TritonBatch, obstacle
from evomerge.weights.triton.kernels import BLOCK
from evomerge.weights.triton.resident import SPARE_BYTES, ResidentSources
from evomerge.weights.windows import whole


def test_cpu_merges_more_models_than_the_kernels_take(caplog):
    n_models = MAX_INPUTS + 1
    pool = WeightPool.holding({(f"m{i}", "w"): torch.full((10,), float(i)) for i in range(n_models)})
    inputs = tuple(TensorInput(f"m{i}", "w", {"weight": 1.0}) for i in range(n_models))
    step = TensorStep("w", (10,), "linear", inputs, None, {"normalize": True})
    plan = MergePlan((step,), 0, 0, "float32", "float32", 0)
    target, merger = Views(plan, torch.float32), Merger(pool)
    with caplog.at_level(logging.WARNING):
        merger.write(plan, target)
        merger.write(plan, target)
    assert torch.equal(target.tensor("w"), torch.full((10,), 8.0))
    assert [record.getMessage() for record in caplog.records] == [
        "merging on the CPU and copying to cpu: 17 models are merged, but the GPU's kernels take at most 16"
    ]


@pytest.mark.parametrize("method", CPU_ONLY)
def test_methods_without_gpu_kernels_are_left_to_the_cpu(caplog, monkeypatch, method):
    assert method not in gpu_methods()
    monkeypatch.setattr(TritonBatch, "_launch", None)
    plan, pool = fixed_case(method, 2)
    target = Views(plan, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        Merger(pool).write(plan, target)
    assert torch.equal(target.tensor("w"), next(Merger(pool, fused=False).tensors(plan))[1])
    assert "with these settings, has kernels for the CPU only" in caplog.text


@pytest.mark.parametrize("case", ["free", "allowed", "in pieces"])
def test_gpu_without_room_leaves_the_merge_to_the_cpu(caplog, monkeypatch, case):
    gpu_bytes = None
    if case == "free":
        monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: 10_000.0)
    elif case == "allowed":
        gpu_bytes = SPARE_BYTES + 10_000
    else:
        monkeypatch.setattr("evomerge.weights.triton.resident.torch.zeros", no_memory)
    monkeypatch.setattr(TritonBatch, "_launch", None)
    plan, pool = ties_plan(("a",)), two_tensors()
    target = Views(plan, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        merger = Merger(pool, gpu_bytes=gpu_bytes)
        merger.write(plan, target)
        merger.write(plan, target)
    assert torch.equal(target.tensor("a"), next(Merger(pool).tensors(plan))[1])
    assert caplog.text.count("gpu_memory_utilization") == 1


def test_resident_sources_stay_when_the_gpu_fills_up(monkeypatch):
    plan, pool = ties_plan(("a",)), two_tensors()
    merger, target = Merger(pool), Views(plan, torch.bfloat16)
    merger.write(plan, target)
    expected = target.tensor("a").clone()
    monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: -1.0)
    monkeypatch.setattr("evomerge.weights.fused.batch.FusedBatch.run", None)
    merger.write(plan, target)
    assert torch.equal(target.tensor("a"), expected)


def no_memory(*_, **__):
    raise torch.OutOfMemoryError


def test_gpu_without_room_for_ranks_leaves_della_to_the_cpu(caplog, monkeypatch):
    plan, pool = della_case(3, rescale=False, shape=(2, BLOCK))
    sources = 2 * BLOCK * (2 + 2 + 4 + 2)  # base and experts, in bfloat16, float32 and float16
    n_ranked = 2  # with a density of 1 - 1e-6, nothing is dropped
    ranks = 2 * BLOCK * 2 * n_ranked
    target, merger = Views(plan, torch.float32), Merger(pool)
    monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: float(sources + ranks - 1))
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(TritonBatch, "_launch", None)
        merger.write(plan, target)
    assert torch.equal(target.tensor("w"), next(Merger(pool).tensors(plan))[1])
    assert "gpu_memory_utilization" in caplog.text
    monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: float(sources + ranks))
    assert torch.equal(written(plan, pool, torch.float32), target.tensor("w"))


def test_resident_sources_count_against_the_memory_limit(monkeypatch):
    """The limit leaves room for the sources of one tensor: three blocks each of base and model, at two bytes per element."""
    pool, ran = two_tensors(), []
    launch = TritonBatch._launch
    monkeypatch.setattr(TritonBatch, "_launch", lambda self, *a: (ran.append(a), launch(self, *a))[1])
    merger = Merger(pool, gpu_bytes=SPARE_BYTES + 3 * 2 * 2 * BLOCK)
    for name, n_runs in (("a", 1), ("a", 2), ("b", 2)):
        plan = ties_plan((name,))
        target = Views(plan, torch.bfloat16)
        merger.write(plan, target)
        assert torch.equal(target.tensor(name), next(Merger(pool).tensors(plan))[1])
        assert len(ran) == n_runs


@pytest.mark.parametrize("compiler", [None, "/bin/false", "/no/such/compiler"])
def test_failing_triton_build_leaves_the_merge_to_the_cpu(caplog, monkeypatch, tmp_path, compiler):
    """Triton's own build before its first launch on a GPU: no compiler, a failing one (as without Python's headers), or a missing path."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("CC", compiler)

    def launch(kernel, n_programs):
        triton.runtime.build.compile_module_from_src("int x;", "evomerge_test")

    monkeypatch.setattr("evomerge.weights.triton.batch._kernel", launch)
    plan, pool = ties_plan(("a",)), two_tensors()
    target, merger = Views(plan, torch.bfloat16), Merger(pool)
    with caplog.at_level(logging.WARNING):
        merger.write(plan, target)
        merger.write(plan, target)
    assert torch.equal(target.tensor("a"), next(Merger(pool).tensors(plan))[1])
    assert caplog.text.count("merging on the CPU and copying to cpu: triton's kernels do not run there") == 1


def test_kernels_without_effect_are_noticed(monkeypatch):
    monkeypatch.setattr("evomerge.weights.triton.batch._kernel", lambda kernel, n_programs: lambda *arguments: None)
    assert "have no effect" in obstacle(torch.device("cpu"))


def test_missing_compiler_is_reported(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CC", sys.executable)
    assert missing() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "C compiler" in missing()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in missing()
    assert gpu_methods() == ()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert missing() is None


def test_dropped_copies_return_memory_to_the_gpu(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    ResidentSources(WeightPool.holding({}), torch.device("cuda", 0)).drop()
    assert emptied


def test_sources_that_share_memory_are_copied_once():
    shared, other = torch.ones(3 * BLOCK), torch.ones(3 * BLOCK)
    pool = WeightPool.holding({("a", "w"): shared, ("b", "w"): shared, ("c", "w"): other})
    resident = ResidentSources(pool, torch.device("cpu"))
    entries = [(TensorInput(model, "w", {}), whole(3 * BLOCK)) for model in "abc"]
    assert resident.missing_bytes(entries) == 2 * 4 * 3 * BLOCK
    resident.hold(entries)
    a, b, c = (resident.copy(*entry).address for entry in entries)
    assert a == b != c
    assert resident.missing_bytes(entries) == 0


def test_sources_of_different_candidates_are_not_confused():
    """One merger whose candidates use different bases, inputs and ranks of the same tensors."""
    size = 2 * BLOCK + 5
    generator = torch.Generator().manual_seed(0)
    pool = WeightPool.holding({(model, "w"): torch.randn(size, generator=generator).bfloat16() for model in "abcd"})
    target, merger = None, Merger(pool)
    for base, expert, density in [("a", "b", 1.0), ("c", "b", 1.0), ("c", "d", 1.0), ("c", "d", 0.5), ("a", "d", 0.3)]:
        inputs = (TensorInput(expert, "w", {"weight": 0.7, "density": density, "epsilon": 0.1}),)
        shared = {"lambda": 1.0, "normalize": False, "rescale": False}
        step = TensorStep("w", (size,), "della_linear", inputs, TensorInput(base, "w", {}), shared)
        plan = MergePlan((step,), 0, 0, "bfloat16", "float32", 1)
        target = target or Views(plan, torch.bfloat16)
        merger.write(plan, target)
        assert torch.equal(target.tensor("w"), next(Merger(pool).tensors(plan))[1])


def test_dropped_copies_are_not_referenced_any_more():
    pool = two_tensors()
    (step,) = ties_plan(("a",)).steps
    form, window = fuse(step, Statistics(pool)), whole(step.n_elements)
    resident = ResidentSources(pool, torch.device("cpu"))
    assert resident.hold([(entry, window) for entry in step.sources])
    copies = [weakref.ref(copy.tensor) for copy in resident.read(form, window).inputs]
    assert copies[0]() is not None
    assert resident.knows(form, window)
    resident.drop()
    assert copies[0]() is None
