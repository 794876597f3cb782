"""Triton's kernels, run by its interpreter, store the bits that the CPU's kernels store.

`make triton-test` runs these in a process of their own, with triton on its path and TRITON_INTERPRET=1. The interpreter needs no patches:
addresses in tables are addresses of the CPU's memory there.
"""

import logging
import math
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="triton stays out of this environment; `make triton-test` runs this")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here only under TRITON_INTERPRET=1: `make triton-test`", allow_module_level=True)

import triton.language as tl
from fused_cases import BY_DIRECTION, DTYPES, Views, cases, close, fixed_case

import evomerge.weights.blocks as blocks
import evomerge.weights.fused.kernels as cpu_kernels
from evomerge.core import CheckpointError
from evomerge.plan import MergePlan, Piece, Region, TensorInput, TensorStep
from evomerge.weights import Merger, WeightPool, gpu_methods
from evomerge.weights.fused.formulas import SUM
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import CPU_ONLY, fuse
from evomerge.weights.fused.tables import KINDS
from evomerge.weights.philox import keep_mask, mask_key, random_halves
from evomerge.weights.triton import kernels, missing, pruning
from evomerge.weights.triton.batch import MAX_INPUTS, TritonBatch, obstacle
from evomerge.weights.triton.kernels import BLOCK, CHUNK_BLOCKS
from evomerge.weights.triton.resident import SPARE_BYTES, ResidentSources
from evomerge.weights.triton.tables import chunks_of

VIEWS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def written(plan, pool, dtype, **options):
    """What the Triton kernels write for `plan`; fails where they are not what wrote it."""
    merger, target = Merger(pool), Views(plan, dtype, **options)
    runs = []
    run = TritonBatch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBatch, "run", lambda self, *a: (runs.append(a), run(self, *a))[1])
        patch.setattr("evomerge.weights.fused.batch.FusedBatch.run", None)
        merger.write(plan, target)
    assert runs
    assert target.untouched()
    return target.tensor(plan.steps[0].output)


METHODS = gpu_methods()


@pytest.mark.parametrize("math_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_as_the_cpu(method, math_dtype):
    if math_dtype != "float32" and method in BY_DIRECTION:
        pytest.skip("inner products are those of float32: plain torch merges in lower precisions")
    compared = []

    @settings(max_examples=25)
    @given(cases(method, (BLOCK, 2 * BLOCK), math_dtype), st.sampled_from([0.0, 0.3]), st.sampled_from([0, 1, 8]))
    def check(case, cut, offset):
        plan, pool = case
        (step,) = plan.steps
        form = fuse(step, math.prod(step.shape), plan.seed, Statistics(pool, KINDS[VIEWS[math_dtype]]))
        if form is None or form.formula != SUM or len(form.inputs) > MAX_INPUTS:
            return  # left to plain torch on every device; merges by rows, and base and 16 models of model_stock, to the CPU
        compared.append(plan)
        (_, expected) = next(Merger(pool).tensors(plan))
        found = written(plan, pool, VIEWS[plan.dtype], cut=cut, offset=offset)
        if math_dtype != "float32":
            assert torch.equal(found, expected)  # how far both are from plain torch is tested on the CPU
            return
        if step.parameters.get("rescale"):
            assert close(found, expected, plan)  # the norms' sums are made in another order
        else:
            assert torch.equal(found, expected)
        (_, plain) = next(Merger(pool, fused=False).tensors(plan))
        assert close(found, plain, plan)

    check()
    assert compared


@settings(max_examples=20)
@given(st.integers(0, 1 << 38), st.integers(0, 5))
def test_random_numbers_are_those_of_the_cpu(counter, seed):
    start, key = 8 * counter, mask_key(seed, "x", 1)
    halves = torch.zeros(BLOCK, dtype=torch.int64)
    _halves[(1,)](halves, torch.tensor(key), torch.tensor([start]), BLOCK=BLOCK)
    assert np.array_equal(halves.numpy(), random_halves(key, start, BLOCK))


@triton.jit
def _halves(out, keys, start, BLOCK: tl.constexpr):
    key0, key1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    numbers = pruning.random_block(key0, key1, tl.load(start), BLOCK)
    tl.store(out + tl.arange(0, BLOCK), (numbers >> 16).to(tl.int64))


@pytest.mark.parametrize("density", [0.0, 1e-6, 0.3, 1 - 2**-16, 1.0])
def test_masks_are_those_of_the_cpu(density):
    """A delta of one everywhere shows the mask."""
    n_elements = 3 * BLOCK + 77
    pool = WeightPool.holding({("base", "w"): torch.zeros(n_elements), ("m", "w"): torch.ones(n_elements)})
    entry = TensorInput("m", "w", {"weight": 1.0, "density": density})
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    step = TensorStep("w", (n_elements,), "dare_linear", (entry,), TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "float32", "float32", 11)
    mask = keep_mask(mask_key(11, "w", 0), (n_elements,), density)
    assert torch.equal(written(plan, pool, torch.float32) != 0, mask)


def della_case(n_models, method="della", *, rescale, normalize=True, levels=0, shape=(30, 97)):
    """A plan of one tensor whose experts are pruned with all sorts of densities, and the pool for it.

    Args:
        n_models: how many experts.
        method: della or della_linear.
        rescale, normalize: as in the recipe.
        levels: distinct magnitudes of the deltas; 0 = all different.
        shape: of the tensor.
    """
    edges = [
        (0.0, 0.0),
        (1.0, 0.0),
        (0.5, 0.0),
        (0.5, 0.4999999),
        (1e-6, 5e-7),
        (1 - 1e-6, 5e-7),
        (0.3, 0.2),
        (0.6, 0.1),
    ]
    generator = torch.Generator().manual_seed(n_models)
    tensors = {("base", "w"): torch.randn(shape, generator=generator).bfloat16()}
    inputs = []
    for number in range(n_models):
        density, epsilon = edges[(number + 3) % len(edges)]
        noise = torch.randn(shape, generator=generator)
        if levels:
            noise = (noise * levels).round() / levels
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        tensors[f"m{number}", "w"] = (tensors["base", "w"].float() + noise).to(dtype)
        parameters = {"weight": 0.4 - 0.1 * number, "density": density, "epsilon": epsilon}
        inputs.append(TensorInput(f"m{number}", "w", parameters))
    shared = {"lambda": 0.9, "normalize": normalize, "rescale": rescale}
    step = TensorStep("w", shape, method, tuple(inputs), TensorInput("base", "w", {}), shared)
    return MergePlan((step,), 0, 0, "float32", "float32", 3), WeightPool.holding(tensors)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("n_models", [1, 3, MAX_INPUTS])
def test_ranks_decide_as_on_the_cpu(n_models, method, levels, rescale):
    plan, pool = della_case(n_models, method, rescale=rescale, levels=levels)
    found = written(plan, pool, torch.float32, cut=0.4)
    assert torch.equal(found, next(Merger(pool).tensors(plan))[1])
    if not rescale:
        assert torch.equal(found, next(Merger(pool, fused=False).tensors(plan))[1])


@pytest.mark.parametrize(
    ("density", "epsilon"),
    [(0.0, 0.0), (1e-6, 5e-7), (0.3, 0.3 - 1e-9), (0.7, 0.3 - 1e-9), (1 - 2**-16, 0), (1.0, 0.0)],
)
@pytest.mark.parametrize("shape", [(3 * BLOCK + 77,), (5, 1300), (4000, 1), (1, 1)])
def test_masks_by_rank_are_those_of_the_reference(shape, density, epsilon):
    """Deltas that are never zero show the mask; most of their magnitudes are equal to others."""
    deltas = 1.0 + torch.arange(math.prod(shape)).reshape(shape) % 7
    pool = WeightPool.holding({("base", "w"): torch.zeros(shape), ("m", "w"): deltas})
    entry = TensorInput("m", "w", {"weight": 1.0, "density": density, "epsilon": epsilon})
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    step = TensorStep("w", shape, "della_linear", (entry,), TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "float32", "float32", 11)
    found = written(plan, pool, torch.float32)
    assert torch.equal(found, next(Merger(pool, fused=False).tensors(plan))[1])
    assert torch.equal(found[found != 0], deltas[found != 0])


def test_norms_are_those_of_rounded_deltas():
    """In bfloat16 the delta -252.859375 is -253, which makes another norm of what is kept, and here another scale."""
    n_elements, n_kept = 1000, 307
    pool = WeightPool.holding(
        {("base", "w"): torch.full((n_elements,), 256.0), ("m", "w"): torch.full((n_elements,), 3.140625)}
    )
    entry = TensorInput("m", "w", {"weight": 1.0, "density": n_kept / n_elements})
    shared = {"lambda": 1.0, "normalize": False, "rescale": True}
    step = TensorStep("w", (n_elements,), "ties", (entry,), TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "bfloat16", "bfloat16", 0)
    (_, expected) = next(Merger(pool).tensors(plan))
    assert torch.equal(expected, next(Merger(pool, fused=False).tensors(plan))[1])
    assert torch.equal(written(plan, pool, torch.bfloat16), expected)


def two_tensors(n_elements=5000, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("a", "b"):
        base = torch.randn(n_elements, generator=generator)
        tensors["base", name] = base.bfloat16()
        tensors["m", name] = (scale * (base + 0.1 * torch.randn(n_elements, generator=generator))).bfloat16()
    return WeightPool.holding(tensors)


def ties_plan(names, n_elements=5000, dtype="bfloat16", weight=0.7):
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    steps = [
        TensorStep(
            name,
            (n_elements,),
            "ties",
            (TensorInput("m", name, {"weight": weight, "density": 0.5}),),
            TensorInput("base", name, {}),
            shared,
        )
        for name in names
    ]
    return MergePlan(tuple(steps), 0, 0, dtype, "float32", 0)


def test_one_launch_computes_all_tensors_of_a_kind(monkeypatch):
    plan, pool = ties_plan(("a", "b")), two_tensors()
    launches = []
    launch = TritonBatch._launch
    monkeypatch.setattr(TritonBatch, "_launch", lambda self, *a: (launches.append(a), launch(self, *a))[1])
    target, merger = Views(plan, torch.bfloat16), Merger(pool)
    for _ in range(2):
        merger.write(plan, target)
    assert len(launches) == 2
    for name, tensor in Merger(pool).tensors(plan):
        assert torch.equal(target.tensor(name), tensor)


def test_pieces_along_a_tensor():
    n_elements = BLOCK + 500
    pool = two_tensors(n_elements)
    inputs = (TensorInput("base", "a", {}), TensorInput("m", "a", {}))
    pieces = (Piece(100, (1.0, 0.0)), Piece(BLOCK + 3, (0.25, 0.5)), Piece(n_elements, (-1.0, 2.0)))
    plan = MergePlan(
        (TensorStep("a", (n_elements,), "piecewise", inputs, None, {}, pieces),), 0, 0, "bfloat16", "float32", 0
    )
    (_, expected) = next(Merger(pool).tensors(plan))
    assert torch.equal(written(plan, pool, torch.bfloat16, cut=0.4), expected)


@pytest.mark.parametrize("view", DTYPES)
@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32"])
def test_any_dtype_of_the_engine(out, view):
    plan, pool = ties_plan(("a",), dtype=out), two_tensors()
    target = Views(plan, view)
    Merger(pool).write(plan, target)
    assert torch.equal(target.tensor("a"), next(Merger(pool).tensors(plan))[1].to(view))


def test_columns_of_an_engine_that_is_sharded():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(48, 64, generator=generator)
    pool = WeightPool.holding({("base", "a"): base, ("m", "a"): base + torch.randn(48, 64, generator=generator)})
    plan = MergePlan(
        (
            TensorStep(
                "a",
                (48, 64),
                "task_arithmetic",
                (TensorInput("m", "a", {"weight": 0.3}),),
                TensorInput("base", "a", {}),
                {"lambda": 1.0, "normalize": False},
            ),
        ),
        0,
        0,
        "float32",
        "float32",
        0,
    )
    shard = torch.zeros(48, 16)

    class Shard:
        def names(self):
            return ["a"]

        def regions(self, name):
            return [Region((slice(0, 48), slice(16, 32)), shard)]

    Merger(pool).write(plan, Shard())
    assert torch.equal(shard, next(Merger(pool).tensors(plan))[1][:, 16:32])


def test_overflow_is_named_and_leaves_zeros():
    plan, pool = ties_plan(("a", "b"), dtype="float16", weight=1e6), two_tensors()
    target = Views(plan, torch.float16)
    with pytest.raises(CheckpointError, match="merged tensor 'a' holds values outside the range of float16"):
        Merger(pool).write(plan, target)
    assert not target.tensor("b").any()


def test_more_models_than_the_kernels_take_are_merged_by_the_cpu(caplog):
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
        "merging on the CPU and copying to cpu: 17 models are merged, and the GPU's kernels take 16"
    ]


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([blocks.BF16, blocks.F16, blocks.F32]))
def test_rounding_is_that_of_the_cpu(seed, precision):
    values = np.random.default_rng(seed).integers(0, 1 << 32, BLOCK, np.uint32).view(np.float32)
    values[: len(EDGES)] = EDGES
    found = torch.from_numpy(values.copy())
    _rounded[(1,)](found, PRECISION=precision, BLOCK=BLOCK)
    blocks.round_block(values, BLOCK, precision)
    assert np.array_equal(np.isnan(found.numpy()), np.isnan(values))
    number = ~np.isnan(values)
    assert np.array_equal(found.numpy().view(np.uint32)[number], values.view(np.uint32)[number])


_HALF_EDGES = [2**-24, 2**-25, 2**-25 * 1.001, 3 * 2**-25, 2**-14, 65504.0, 65519.9, 65520.0, -65520.0]
EDGES = [0.0, -0.0, 1e-45, 3.4e38, np.inf, *_HALF_EDGES]
"""around the least and the largest float16, and of float32"""


@triton.jit
def _rounded(values, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(values + lanes, kernels.rounded(tl.load(values + lanes), PRECISION))


@pytest.mark.parametrize("method", CPU_ONLY)
def test_methods_without_kernels_there_are_left_to_the_cpu(caplog, monkeypatch, method):
    assert method not in METHODS
    monkeypatch.setattr(TritonBatch, "run", None)
    plan, pool = fixed_case(method, 2)
    target = Views(plan, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        Merger(pool).write(plan, target)
    assert torch.equal(target.tensor("w"), next(Merger(pool, fused=False).tensors(plan))[1])
    assert "as it is set there, has kernels on the CPU only" in caplog.text


@pytest.mark.parametrize("case", ["free", "allowed", "in pieces"])
def test_a_gpu_without_room_leaves_the_merge_to_the_cpu(caplog, monkeypatch, case):
    gpu_bytes = None
    if case == "free":
        monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: 10_000.0)
    elif case == "allowed":
        gpu_bytes = SPARE_BYTES + 10_000
    else:
        monkeypatch.setattr("evomerge.weights.triton.resident.torch.zeros", no_memory)
    monkeypatch.setattr(TritonBatch, "run", None)
    plan, pool = ties_plan(("a",)), two_tensors()
    target = Views(plan, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        merger = Merger(pool, gpu_bytes=gpu_bytes)
        merger.write(plan, target)
        merger.write(plan, target)
    assert torch.equal(target.tensor("a"), next(Merger(pool).tensors(plan))[1])
    assert caplog.text.count("gpu_memory_utilization") == 1


def test_what_is_held_counts_against_what_is_allowed(monkeypatch):
    """Room for the sources of one tensor: three blocks each of base and model, of two bytes an element."""
    pool, ran = two_tensors(), []
    run = TritonBatch.run
    monkeypatch.setattr(TritonBatch, "run", lambda self, *a: (ran.append(a), run(self, *a))[1])
    merger = Merger(pool, gpu_bytes=SPARE_BYTES + 3 * 2 * 2 * BLOCK)
    for name, n_runs in (("a", 1), ("a", 2), ("b", 2)):
        plan = ties_plan((name,))
        target = Views(plan, torch.bfloat16)
        merger.write(plan, target)
        assert torch.equal(target.tensor(name), next(Merger(pool).tensors(plan))[1])
        assert len(ran) == n_runs


@pytest.mark.parametrize("compiler", [None, "/bin/false", "/no/such/compiler"])
def test_a_build_that_fails_leaves_the_merge_to_the_cpu(caplog, monkeypatch, tmp_path, compiler):
    """triton's own build, as before its first launch on a GPU: no compiler, one that fails (as without Python's headers), one not there."""
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
    assert "to no effect" in obstacle(torch.device("cpu"))


def test_what_is_missing_is_said(monkeypatch):
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


def no_memory(*_, **__):
    raise torch.OutOfMemoryError


def test_a_gpu_without_room_for_ranks_leaves_della_to_the_cpu(caplog, monkeypatch):
    plan, pool = della_case(3, rescale=False, shape=(2, BLOCK))
    sources = 2 * BLOCK * (2 + 2 + 4 + 2)  # base and experts, in bfloat16, float32 and float16
    n_ranked = sum(0 < entry.parameters["density"] < 1 for entry in plan.steps[0].inputs)
    ranks = 2 * BLOCK * 2 * n_ranked
    target, merger = Views(plan, torch.float32), Merger(pool)
    monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: float(sources + ranks - 1))
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(TritonBatch, "run", None)
        merger.write(plan, target)
    assert torch.equal(target.tensor("w"), next(Merger(pool).tensors(plan))[1])
    assert "gpu_memory_utilization" in caplog.text
    monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: float(sources + ranks))
    assert torch.equal(written(plan, pool, torch.float32), target.tensor("w"))


def test_dropped_copies_go_back_to_the_gpu(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    ResidentSources(WeightPool.holding({}), torch.device("cuda", 0)).drop()
    assert emptied


def test_sources_that_share_memory_are_copied_once():
    shared, other = torch.ones(3 * BLOCK), torch.ones(3 * BLOCK)
    pool = WeightPool.holding({("a", "w"): shared, ("b", "w"): shared, ("c", "w"): other})
    resident = ResidentSources(pool, torch.device("cpu"))
    entries = [TensorInput(model, "w", {}) for model in "abc"]
    assert resident.missing_bytes(entries) == 2 * 4 * 3 * BLOCK
    resident.hold(entries)
    a, b, c = (resident.tensor(entry).data_ptr() for entry in entries)
    assert a == b != c
    assert resident.missing_bytes(entries) == 0


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5 * BLOCK * CHUNK_BLOCKS), st.integers(0, 2 * BLOCK * CHUNK_BLOCKS)), max_size=4)
)
def test_chunks_cover_every_range_once(spans):
    ranges = tuple((first, first + size) for first, size in spans)
    chunks = chunks_of(ranges, torch.device("cpu"))
    for row, (first, end) in enumerate(ranges):
        own = chunks[chunks[:, 0] == row, 1:].tolist()
        assert all(0 < last - start <= CHUNK_BLOCKS for start, last in own)
        covered = [block for start, last in own for block in range(start, last)]
        assert covered == (list(range(first // BLOCK, -(-end // BLOCK))) if end > first else [])


def test_both_sides_number_kinds_and_modes_alike():
    for name in ("BF16", "F32", "F16", "F32_AS_BF16"):
        assert getattr(kernels, name).value == getattr(blocks, name)
    for name in ("KEEP_ALL", "MAGNITUDE", "BAND", "RANDOM", "RANKED"):
        assert getattr(pruning, name).value == getattr(cpu_kernels, name)
    assert all(kind < 1 << kernels.KIND_BITS for kind in (blocks.BF16, blocks.F32, blocks.F16))
