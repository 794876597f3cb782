"""Triton's kernels, run by its interpreter, store the same bits as the CPU's kernels.

`make triton-test` runs these in a separate process, with triton on its path and TRITON_INTERPRET=1. The interpreter needs no patches:
under it, the addresses in tables are CPU memory addresses.
"""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="triton stays out of this environment; `make triton-test` runs this")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here only under TRITON_INTERPRET=1: `make triton-test`", allow_module_level=True)

import triton.language as tl
from fused_cases import BY_DIRECTION, DTYPES, Views, cases, close, fixed_case, kept_norms_seen
from triton_cases import della_case, ties_plan, two_tensors, written

import evomerge.weights.fused.blocks as blocks
import evomerge.weights.fused.kernels as cpu_kernels
from evomerge.core import CheckpointError
from evomerge.plan import MergePlan, Piece, Region, TensorInput, TensorStep
from evomerge.weights import Merger, WeightPool, gpu_methods
from evomerge.weights.fused import statistics
from evomerge.weights.fused.formulas import SUM
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import fuse
from evomerge.weights.fused.tables import KINDS
from evomerge.weights.philox import keep_mask, mask_key, random_halves
from evomerge.weights.triton import batch, kernels, pruning
from evomerge.weights.triton.batch import MAX_INPUTS, TritonBatch
from evomerge.weights.triton.kernels import BLOCK, CHUNK_BLOCKS
from evomerge.weights.triton.resident import ResidentSources
from evomerge.weights.triton.tables import chunks_of

VIEWS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


METHODS = gpu_methods()


@pytest.mark.parametrize("math_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_kernels_give_the_same_bits_as_the_cpu(method, math_dtype):
    if math_dtype != "float32" and method in BY_DIRECTION:
        pytest.skip("inner products are those of float32: plain torch merges in lower precisions")
    compared = []

    @settings(max_examples=25)
    @given(
        cases(method, (BLOCK, 2 * BLOCK), math_dtype),
        st.sampled_from([0.0, 0.3]),
        st.sampled_from([0, 1, 8]),
        st.integers(0, 2),
    )
    def check(case, cut, offset, along):
        plan, pool = case
        (step,) = plan.steps
        form = fuse(step, Statistics(pool, KINDS[VIEWS[math_dtype]]))
        if form is None or form.formula != SUM or len(form.inputs) > MAX_INPUTS:
            return  # left to plain torch on every device, or (merges by rows, and model_stock with base and 16 models) to the CPU
        compared.append(plan)
        (_, expected) = next(Merger(pool).tensors(plan))
        found = written(plan, pool, VIEWS[plan.dtype], cut=cut, offset=offset, along=along)
        assert torch.equal(found, expected)
        if math_dtype != "float32":
            return  # the CPU tests cover how far both are from plain torch
        (_, plain) = next(Merger(pool, fused=False).tensors(plan))
        assert close(found, plain, plan)

    check()
    assert compared


@settings(max_examples=20)
@given(st.integers(0, 1 << 38), st.sampled_from([0, 5, 1 << 31]), st.integers(0, 5))
def test_random_numbers_equal_those_of_the_cpu(group, origin, seed):
    key = mask_key(seed, "x", 1)
    found = numbers_of(key, 8 * group, (origin, 0, 0), STRIDED=False)
    assert np.array_equal(found, random_halves(key, 8 * (origin + group), BLOCK))


@settings(max_examples=20)
@given(
    st.sampled_from([0, 3, 64, 7 << 30]), st.sampled_from([1, 9, 112, 224, 256, 700, 1 << 31]), st.integers(0, 1 << 20)
)
def test_random_numbers_of_columns_equal_those_of_the_whole_tensor(origin, length, gap):
    key, pitch = mask_key(0, "x", 1), length + gap
    for block in (0, 1, 1023, (1 << 24) - 1):
        found = numbers_of(key, block * BLOCK, (origin, length, pitch), STRIDED=True)
        groups = block * (BLOCK // 8) + np.arange(BLOCK // 8)
        first = 8 * (origin + groups // length * pitch + groups % length)
        assert np.array_equal(found, np.concatenate([random_halves(key, int(start), 8) for start in first]))


def numbers_of(key, start, stretches, **constants):
    halves = torch.zeros(BLOCK, dtype=torch.int64)
    _halves[(1,)](halves, torch.tensor(key), torch.tensor([start, *stretches]), **constants, BLOCK=BLOCK)
    return halves.numpy()


@triton.jit
def _halves(out, keys, places, STRIDED: tl.constexpr, BLOCK: tl.constexpr):
    key0, key1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    stretches = (tl.load(places + 1), tl.load(places + 2), tl.load(places + 3))
    numbers = pruning.random_block(key0, key1, tl.load(places), stretches, STRIDED, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), (numbers >> 16).to(tl.int64))


@pytest.mark.parametrize("density", [0.0, 1e-6, 0.3, 1 - 2**-16, 1.0])
def test_random_masks_equal_those_of_the_cpu(density):
    """A delta of one everywhere reveals the mask."""
    n_elements = 3 * BLOCK + 77
    pool = WeightPool.holding({("base", "w"): torch.zeros(n_elements), ("m", "w"): torch.ones(n_elements)})
    entry = TensorInput("m", "w", {"weight": 1.0, "density": density})
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    step = TensorStep("w", (n_elements,), "dare_linear", (entry,), TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "float32", "float32", 11)
    mask = keep_mask(mask_key(11, "w", 0), (n_elements,), density)
    assert torch.equal(written(plan, pool, torch.float32) != 0, mask)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("n_models", [1, 3, MAX_INPUTS])
def test_ranks_select_the_same_elements_as_on_the_cpu(n_models, method, levels, rescale):
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
def test_rank_masks_equal_those_of_the_reference(shape, density, epsilon):
    """Deltas that are never zero reveal the mask; most of their magnitudes occur several times."""
    deltas = 1.0 + torch.arange(math.prod(shape)).reshape(shape) % 7
    pool = WeightPool.holding({("base", "w"): torch.zeros(shape), ("m", "w"): deltas})
    entry = TensorInput("m", "w", {"weight": 1.0, "density": density, "epsilon": epsilon})
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    step = TensorStep("w", shape, "della_linear", (entry,), TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "float32", "float32", 11)
    found = written(plan, pool, torch.float32)
    assert torch.equal(found, next(Merger(pool, fused=False).tensors(plan))[1])
    assert torch.equal(found[found != 0], deltas[found != 0])


def test_norms_are_computed_from_rounded_deltas():
    """In bfloat16 the delta -252.859375 is -253, which changes the norm of the kept elements and, in this case, the scale."""
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


def test_expert_without_kept_elements_is_not_rescaled():
    """The GPU kernels would keep an element whose random number is 0, and scaling by its norm would exceed the float16 range."""
    plan, pool = fixed_case("dare_linear", 2, rescale=True)
    (step,) = plan.steps
    first, second = step.inputs
    inputs = (first._replace(parameters={**first.parameters, "density": 0.0}), second)
    plan = replace(plan, seed=1, math_dtype="float16", steps=(step._replace(inputs=inputs),))
    assert torch.equal(written(plan, pool, torch.bfloat16), next(Merger(pool).tensors(plan))[1])


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_norms_equal_those_of_the_cpu_to_the_last_bit(method, monkeypatch):
    measured, known = kept_norms_seen(
        method, monkeypatch, batch, lambda plan, pool: written(plan, pool, torch.bfloat16)
    )
    assert measured == known
    assert all(norm > 0 for norm in known)


def test_unknown_norm_is_measured_next_to_a_known_one(monkeypatch):
    plan, pool = fixed_case("dare_ties", 2, rescale=True)
    expected = next(Merger(pool).tensors(plan))[1]
    kept_l1 = Statistics.kept_l1
    asked = []

    def of_the_first(self, pair, *mask):
        asked.append(kept_l1(self, pair, *mask) if pair[1] == plan.steps[0].inputs[0].key else None)
        return asked[-1]

    monkeypatch.setattr(statistics, "LARGE_TENSOR", 0)
    monkeypatch.setattr(Statistics, "kept_l1", of_the_first)
    assert torch.equal(written(plan, pool, torch.bfloat16), expected)
    assert [norm is None for norm in asked] == [False, True]


def test_one_launch_computes_all_tensors_of_a_kind_in_a_group(monkeypatch):
    """The first candidate is one group. Later ones have several, so that the next group is prepared while the GPU computes."""
    plan, pool = ties_plan(("a", "b")), two_tensors()
    launched = []
    launch = TritonBatch._launch
    monkeypatch.setattr(
        TritonBatch, "_launch", lambda self, rows, v: (launched.append(len(rows)), launch(self, rows, v))[1]
    )
    target, merger = Views(plan, torch.bfloat16), Merger(pool)
    for weight, n_rows in ((0.7, [2]), (0.4, [1, 1])):
        launched.clear()
        plan = ties_plan(("a", "b"), weight=weight)
        merger.write(plan, target)
        assert launched == n_rows
        for name, tensor in Merger(pool).tensors(plan):
            assert torch.equal(target.tensor(name), tensor)


@pytest.mark.parametrize("bad", ["a", "b"])
def test_bad_tensor_in_any_group_leaves_only_zeros(bad):
    plan, pool = ties_plan(("a", "b")), two_tensors()
    target, merger = Views(plan, torch.bfloat16), Merger(pool)
    merger.write(plan, target)
    steps = {step.output: step for step in plan.steps}
    huge = tuple(entry._replace(parameters={"weight": 1e38, "density": 0.5}) for entry in steps[bad].inputs)
    steps[bad] = steps[bad]._replace(inputs=huge, parameters=steps[bad].parameters | {"lambda": 1e38})
    with pytest.raises(CheckpointError, match=f"'{bad}'"):
        merger.write(replace(plan, steps=tuple(steps.values())), target)
    assert not any(target.tensor(name).any() for name in "ab")


class Parameters:
    """A target of whole tensors; `b` is a column of a matrix, so results are copied into it."""

    def __init__(self, n_elements):
        self.views = {
            name: torch.ones(n_elements, width, dtype=torch.bfloat16)[:, 0] for name, width in (("a", 1), ("b", 2))
        }

    def names(self):
        return list(self.views)

    def regions(self, name):
        return [Region((slice(0, len(self.views[name])),), self.views[name])]


def test_tensor_refused_later_leaves_zeros_in_earlier_groups():
    plan, pool, target = ties_plan(("a", "b")), two_tensors(), Parameters(5000)
    merger = Merger(pool)
    merger.write(plan, target)
    assert target.views["a"].any()
    good, bad = plan.steps
    bad = bad._replace(parameters=bad.parameters | {"lambda": 1e39})
    with pytest.raises(CheckpointError, match="'b'"):
        merger.write(replace(plan, steps=(good, bad)), target)
    assert not target.views["a"].any()


def test_pieces_along_a_tensor_match_the_cpu():
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
def test_every_engine_dtype_matches_the_cpu(out, view):
    plan, pool = ties_plan(("a",), dtype=out), two_tensors()
    target = Views(plan, view)
    Merger(pool).write(plan, target)
    assert torch.equal(target.tensor("a"), next(Merger(pool).tensors(plan))[1].to(view))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_each_process_holds_only_its_own_part(method, along, rescale, monkeypatch):
    """Even if norms of whole tensors have to be measured, as with `rescale` and pruning by magnitude."""
    plan, pool = fixed_case(method, 2, rescale=rescale, shape=(48, 320))
    (step,) = plan.steps
    (_, expected) = next(Merger(pool).tensors(plan))
    held = {}
    hold = ResidentSources.hold
    monkeypatch.setattr(ResidentSources, "hold", lambda self, items: held.update(parts(items)) or hold(self, items))
    index = (slice(24, 36), slice(0, 320)) if along == 0 else (slice(0, 48), slice(80, 160))
    target = Part("w", Region(index, torch.full((12, 320) if along == 0 else (48, 80), torch.nan).bfloat16()))
    monkeypatch.setattr("evomerge.weights.fused.batch.FusedBatch.run", None)
    Merger(pool).write(plan, target)
    assert torch.equal(target.region.view, expected[index])
    form = fuse(step, Statistics(pool))
    assert set(held.values()) == {step.n_elements // 4}
    assert len(held) == len({entry.key for entry, _, _ in form.inputs} | {e.key for e in [form.base] if e}) + sum(
        prune.ranks is not None for _, _, prune in form.inputs
    )


def parts(items):
    """Source -> how many of its elements are copied."""
    return {
        source.key if isinstance(source, TensorInput) else id(source): window.n_elements for source, window in items
    }


class Part:
    """A target that holds one part of one tensor."""

    def __init__(self, name, region):
        self.name, self.region = name, region

    def names(self):
        return [self.name]

    def regions(self, name):
        return [self.region]


def test_part_that_cuts_mask_groups_equals_that_of_the_whole_tensor():
    plan, pool = fixed_case("dare_ties", 2, shape=(48, 320))
    (_, expected) = next(Merger(pool).tensors(plan))
    index = (slice(0, 48), slice(3, 50))
    target = Part("w", Region(index, torch.full((48, 47), torch.nan).bfloat16()))
    Merger(pool).write(plan, target)
    assert torch.equal(target.region.view, expected[index])


def test_overflow_is_named_and_leaves_zeros():
    plan, pool = ties_plan(("a", "b"), dtype="float16", weight=1e6), two_tensors()
    target = Views(plan, torch.float16)
    with pytest.raises(CheckpointError, match="merged tensor 'a' contains values outside the range of float16"):
        Merger(pool).write(plan, target)
    assert not target.tensor("b").any()


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([blocks.BF16, blocks.F16, blocks.F32]))
def test_rounding_matches_the_cpu(seed, precision):
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


def test_cpu_and_gpu_use_the_same_numbers_for_kinds_and_modes():
    for name in ("BF16", "F32", "F16", "F32_AS_BF16"):
        assert getattr(kernels, name).value == getattr(blocks, name)
    for name in ("KEEP_ALL", "MAGNITUDE", "BAND", "RANDOM", "RANKED"):
        assert getattr(pruning, name).value == getattr(cpu_kernels, name)
    assert all(kind < 1 << kernels.KIND_BITS for kind in (blocks.BF16, blocks.F32, blocks.F16))
