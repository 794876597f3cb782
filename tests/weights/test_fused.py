"""The compiled kernels agree with the plain references: random shapes, dtypes, numbers of sources, densities, and exact ties."""

from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch
from fused_cases import BY_DIRECTION, DTYPES, Views, cases, close, fixed_case
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.core import CheckpointError
from evomerge.plan import MOST_RANKS, MergePlan, TensorInput, TensorStep
from evomerge.weights import WeightPool
from evomerge.weights.fused import statistics
from evomerge.weights.fused.batch import FusedBatch
from evomerge.weights.fused.blocks import BF16, BLOCK, F16, F32, round_block
from evomerge.weights.fused.magnitudes import STRETCH, MagnitudeHistogram, find_cuts
from evomerge.weights.fused.selection import cut_once
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import fuse, fused_methods
from evomerge.weights.fused.tables import CHUNK_ELEMENTS, KINDS
from evomerge.weights.fused.tables import DTYPE_OF as TORCH_OF
from evomerge.weights.fused.threads import Threads
from evomerge.weights.merger import DTYPES as DTYPE_OF
from evomerge.weights.merger import Merger


@pytest.mark.parametrize("method", fused_methods())
def test_fused_equals_reference(method):
    @settings(max_examples=100)
    @given(cases(method))
    def check(case):
        plan, pool = case
        (_, fused), (_, plain) = next(Merger(pool).tensors(plan)), next(Merger(pool, fused=False).tensors(plan))
        assert fused.dtype == plain.dtype
        assert fused.shape == plain.shape
        assert close(fused, plain, plan)

    check()


@pytest.mark.parametrize("math_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", [method for method in fused_methods() if method not in BY_DIRECTION])
def test_lower_precision_arithmetic_equals_reference(method, math_dtype):
    @settings(max_examples=100)
    @given(cases(method, math_dtype=math_dtype))
    def check(case):
        plan, pool = case
        (step,) = plan.steps
        precision = KINDS[DTYPE_OF[math_dtype]]
        assert step.parameters.get("shift") or fuse(step, Statistics(pool, precision)) is not None
        (_, fused), (_, plain) = next(Merger(pool).tensors(plan)), next(Merger(pool, fused=False).tensors(plan))
        assert fused.dtype == plain.dtype
        assert close(fused, plain, plan)

    check()


@pytest.mark.parametrize("method", BY_DIRECTION)
def test_lower_precision_inner_products_equal_reference(method):
    plan, pool = fixed_case(method, 3)
    (step,) = plan.steps
    assert fuse(step, Statistics(pool)) is not None
    assert fuse(step, Statistics(pool, BF16)) is None


@pytest.mark.parametrize("kind", [BF16, F16, F32])
def test_rounding_is_correct_at_every_exponent(kind):
    # the edges of every unit in the last place in both 16-bit formats, around every exponent, and their neighbours
    bits = np.arange(2**20, dtype=np.uint64)
    bits = (bits[:, None] << 12) + np.array([0, 1, 0x7FF, 0x800, 0x801, 0xFFF], np.uint64)
    values = torch.from_numpy(bits.astype(np.uint32).reshape(-1).view(np.float32))
    values = values[~values.isnan()]
    rounded = values.clone().numpy()
    round_block(rounded, len(rounded), kind)
    expected = values.to(TORCH_OF[kind]).float()
    assert torch.equal(torch.from_numpy(rounded).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("method", fused_methods())
def test_shards_cut_anywhere_match_the_whole_tensor(method):
    @settings(max_examples=25)
    @given(
        cases(method),
        st.floats(0, 1),
        st.sampled_from([0, 1, 5]),
        st.integers(0, 2),
        st.sampled_from([torch.bfloat16, torch.float32]),
    )
    def check(case, cut, offset, along, dtype):
        plan, pool = case
        dtype = dtype if plan.dtype == "bfloat16" else DTYPE_OF[plan.dtype]
        target = Views(plan, dtype, cut=cut, offset=offset, along=along)
        Merger(pool).write(plan, target)
        _, whole = next(Merger(pool, threads=1).tensors(plan))
        assert torch.equal(target.tensor("w").to(whole.dtype), whole)
        assert target.untouched()

    check()


@pytest.mark.parametrize("n_sources", [2, 3, 5])
def test_karcher_without_a_tolerance_equals_reference(n_sources):
    plan, pool = fixed_case("karcher", n_sources, dtype=torch.float32)
    (step,) = plan.steps
    plan = replace(plan, dtype="float32", steps=(step._replace(parameters={"max_iter": 15.0, "tol": 0.0}),))
    (_, fused), (_, plain) = next(Merger(pool).tensors(plan)), next(Merger(pool, fused=False).tensors(plan))
    assert fuse(plan.steps[0], Statistics(pool)) is not None
    assert close(fused, plain, plan)


@settings(max_examples=80)
@given(
    st.integers(1, 4000),
    st.sampled_from([0, 1, 2, 50]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_cut_matches_a_stable_sort(n_elements, levels, base_dtype, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n_elements, generator=generator).to(base_dtype)
    if levels:
        tensor = (base.float() + torch.randint(-levels, levels + 1, (n_elements,), generator=generator) / 8).to(dtype)
    else:
        tensor = (base.float() + 0.01 * torch.randn(n_elements, generator=generator)).to(dtype)
    magnitude = (tensor.float() - base.float()).abs()
    order = torch.sort(magnitude, descending=True, stable=True).indices
    histogram = MagnitudeHistogram(base, tensor)
    index = torch.arange(n_elements)
    for k in {0, 1, n_elements // 3, n_elements // 2, n_elements - 1, n_elements}:
        expected = torch.zeros(n_elements, dtype=torch.bool)
        expected[order[:k]] = True
        cut, is_new = histogram.cut(k)
        assert is_new
        find_cuts([(histogram, k, cut)], Threads(1))
        assert histogram.cut(k) == (cut, False)
        for found in (cut, cut_once(base, tensor, k)):
            kept = (magnitude > found.threshold) | ((magnitude == found.threshold) & (index < found.cutoff))
            assert torch.equal(kept & (magnitude > 0), expected & (magnitude > 0)), k


def spiked(n_elements):
    """Large values where the sample of `cut_once` does not look: in the last elements of some blocks."""
    delta = torch.zeros(n_elements)
    delta[BLOCK - 3 :: 40 * BLOCK] = torch.arange(1.0, len(delta[BLOCK - 3 :: 40 * BLOCK]) + 1)
    return delta


@pytest.mark.parametrize(
    "delta",
    [torch.randn, torch.arange, lambda n: torch.arange(n).flip(0), torch.ones, spiked],
    ids=["normal", "rising", "falling", "equal", "spiked"],
)
def test_single_cut_of_a_large_tensor_matches_a_stable_sort(delta):
    n_elements = 300 * BLOCK + 77
    tensor = delta(n_elements).bfloat16()
    magnitude = tensor.float().abs()
    order = torch.sort(magnitude, descending=True, stable=True).indices
    for k in (1, 5, n_elements // 100, n_elements // 2, n_elements - 3):
        cut = cut_once(torch.zeros_like(tensor), tensor, k)
        kept = (magnitude > cut.threshold) | ((magnitude == cut.threshold) & (torch.arange(n_elements) < cut.cutoff))
        expected = torch.zeros(n_elements, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(kept, expected), k


def test_large_tensors_of_many_ranges_and_chunks_equal_reference():
    n_elements = CHUNK_ELEMENTS + 3 * STRETCH + 17
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(n_elements, generator=generator) * 0.02).bfloat16()
    sources = [(base.float() + torch.randn(n_elements, generator=generator) * 0.001).bfloat16() for _ in range(3)]
    tensors = {("base", "w"): base} | {(f"m{i}", "w"): source for i, source in enumerate(sources)}
    pool = WeightPool.holding(tensors)
    for method, density in (("ties", 0.2), ("dare_ties", 0.3)):
        inputs = tuple(TensorInput(f"m{i}", "w", {"weight": 0.5, "density": density}) for i in range(3))
        shared = {"lambda": 1.0, "normalize": True, "rescale": False}
        step = TensorStep("w", (n_elements,), method, inputs, TensorInput("base", "w", {}), shared)
        plan = MergePlan((step,), 0, 0, "bfloat16", "float32", 0)
        (_, plain) = next(Merger(pool, fused=False).tensors(plan))
        for threads in (1, 3):
            (_, fused) = next(Merger(pool, threads=threads).tensors(plan))
            assert torch.equal(fused, plain)


@pytest.mark.parametrize("shape", [(3, 5), (1, 40), (7, 1), (2, 3, 33), (90, 1025)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_della_ranks_by_row(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    pool = WeightPool.holding(
        {(name, "w"): torch.randn(shape, generator=generator).to(dtype) for name in ("base", "m")}
    )
    inputs = (TensorInput("m", "w", {"weight": 1.0, "density": 0.4, "epsilon": 0.3}),)
    shared = {"lambda": 1.0, "normalize": True, "rescale": False}
    step = TensorStep("w", shape, "della", inputs, TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "float32", "float32", 3)
    (_, fused), (_, plain) = next(Merger(pool).tensors(plan)), next(Merger(pool, fused=False).tensors(plan))
    assert torch.equal(fused, plain)


def test_della_uses_the_reference_for_rows_with_too_many_elements_for_16_bit_ranks():
    tensor = torch.arange(MOST_RANKS + 1, dtype=torch.float32)
    pool = WeightPool.holding({("base", "w"): torch.zeros_like(tensor), ("m", "w"): tensor})
    inputs = (TensorInput("m", "w", {"weight": 1.0, "density": 0.4, "epsilon": 0.3}),)
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    step = TensorStep("w", tuple(tensor.shape), "della", inputs, TensorInput("base", "w", {}), shared)
    assert fuse(step, Statistics(pool)) is None


@pytest.mark.parametrize("n_elements", [3 * CHUNK_ELEMENTS + 5, 5 * CHUNK_ELEMENTS + 5])
def test_rescaling_does_not_depend_on_the_number_of_threads(n_elements):
    """It does not depend either on whether norms are measured, as for smaller tensors, or already known."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n_elements, generator=generator)
    expert = base + 0.1 * torch.randn(n_elements, generator=generator)
    pool = WeightPool.holding({("base", "w"): base, ("m", "w"): expert})
    step = TensorStep(
        "w",
        (n_elements,),
        "dare_ties",
        (TensorInput("m", "w", {"weight": 1.0, "density": 0.5}),),
        TensorInput("base", "w", {}),
        {"lambda": 1.0, "normalize": False, "rescale": True},
    )
    plan = MergePlan((step,), 0, 0, "float32", "float32", 0)
    mergers = [*[Merger(pool, threads=threads) for threads in (1, 2, 5)], Merger(pool, once=True)]
    results = [next(merger.tensors(plan))[1] for merger in mergers]
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=60)
@given(cases("sce"), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_sce_selects_any_share_repeatedly(case, shares):
    plan, pool = case
    resident = Merger(pool, threads=2)
    for share in shares:
        candidate = replace(plan, steps=(plan.steps[0]._replace(parameters={"select_topk": share}),))
        (_, plain) = next(Merger(pool, fused=False).tensors(candidate))
        for merger in (resident, Merger(pool, once=True)):
            assert torch.equal(next(merger.tensors(candidate))[1], plain)


def test_sce_positions_are_cached_per_base_and_set_of_experts():
    generator = torch.Generator().manual_seed(0)
    pool = WeightPool.holding({(name, "w"): torch.randn(3000, generator=generator) for name in "abcd"})
    steps = [
        TensorStep(f"w{number}", (3000,), "sce", tuple(TensorInput(name, "w", {}) for name in names), TensorInput("a", "w", {}), {"select_topk": 0.3})
        for number, names in enumerate(["bc", "cd", "bcd", "bc"])
    ]  # fmt: skip
    plan = MergePlan(tuple(steps), 0, 0, "float32", "float32", 0)
    merger, plain = Merger(pool, threads=2), Merger(pool, fused=False)
    target = Views(plan, torch.float32)
    for _ in range(2):
        merger.write(plan, target)
        assert all(torch.equal(target.tensor(name), merged) for name, merged in plain.tensors(plan))


def test_methods_with_different_formulas_are_written_in_one_plan():
    generator = torch.Generator().manual_seed(0)
    pool = WeightPool.holding({(name, "w"): torch.randn(700, generator=generator) for name in "abc"})
    shared = {
        "ram": {"epsilon": 0.5},
        "task_arithmetic": {"lambda": 1.0, "normalize": False},
        "nearswap": {"t": 0.3},
        "linear": {"normalize": False},
    }
    steps = []
    for method, parameters in shared.items():
        names = "b" if method == "nearswap" else "bc"
        inputs = tuple(TensorInput(name, "w", {"weight": 0.5}) for name in names)
        base = None if method == "linear" else TensorInput("a", "w", {})
        steps.append(TensorStep(method, (700,), method, inputs, base, parameters))
    plan = MergePlan(tuple(steps), 0, 0, "float32", "float32", 0)
    target = Views(plan, torch.float32)
    Merger(pool).write(plan, target)
    assert all(torch.equal(target.tensor(name), merged) for name, merged in Merger(pool, fused=False).tensors(plan))


@pytest.mark.parametrize("method", ["ram", "nearswap", "sce"])
def test_results_outside_the_dtype_range_are_named(method):
    sources = {("b", "w"): torch.full((100,), 3.4e38), ("a", "w"): torch.full((100,), -3.4e38)}
    parameters = {"ram": {"epsilon": 0.5}, "nearswap": {"t": 1.0}, "sce": {"select_topk": 1.0}}[method]
    if method == "nearswap":  # the result lies between the two inputs, but rounding it overflows
        sources = {key: torch.full((100,), 3.4028e38) for key in sources}
    step = TensorStep("w", (100,), method, (TensorInput("b", "w", {}),), TensorInput("a", "w", {}), parameters)
    plan = MergePlan((step,), 0, 0, "bfloat16", "float32", 0)
    target = Views(plan, torch.bfloat16)
    with pytest.raises(CheckpointError, match="'w' contains values outside the range of bfloat16"):
        Merger(WeightPool.holding(sources)).write(plan, target)
    assert not target.tensor("w").any()


@pytest.mark.parametrize("shape", [(300, 1000), (2, 70_001), (1, 70_001), (3, 4, 20_000), (70_001,), (70_001, 1)])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("arcee_fusion", {}),
        ("model_stock", {"filter_wise": True}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": False}),
    ],
)
def test_rowwise_methods_equal_reference_for_rows_of_any_size(method, parameters, shape):
    plan, pool = fixed_case(method, 3, shape=shape)
    (step,) = plan.steps
    plan = replace(plan, dtype="float32", steps=(step._replace(parameters=parameters),))
    target, resident = Views(plan, torch.float32, cut=0.4, offset=3), Merger(pool, threads=2)
    resident.write(plan, target)
    (_, plain) = next(Merger(pool, fused=False).tensors(plan))
    if (
        method == "model_stock" and len(shape) == 1
    ):  # a vector is one filter, whose inner products are summed in a different order
        assert torch.allclose(target.tensor("w"), plain, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(target.tensor("w"), plain)
    assert torch.equal(next(Merger(pool, once=True, threads=1).tensors(plan))[1], target.tensor("w"))
    resident.write(plan, target)
    assert target.untouched()


def test_parallel_rows_are_interpolated_linearly():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 40, generator=generator)
    b = torch.cat([3 * a[:3], -a[3:5], torch.randn(1, 40, generator=generator)])
    pool = WeightPool.holding({("a", "w"): a, ("b", "w"): b})
    inputs = (TensorInput("a", "w", {"weight": 0.4}), TensorInput("b", "w", {"weight": 0.6}))
    step = TensorStep("w", (6, 40), "nuslerp", inputs, None, {"nuslerp_flatten": False, "nuslerp_row_wise": False})
    plan = MergePlan((step,), 0, 0, "float32", "float32", 0)
    merged = next(Merger(pool).tensors(plan))[1]
    assert torch.equal(merged, next(Merger(pool, fused=False).tensors(plan))[1])
    assert torch.allclose(merged[:3], 0.4 * a[:3] + 0.6 * b[:3])


def test_concurrent_threads_share_one_array_of_ranks(monkeypatch):
    """Its copies on a GPU are found by its address."""
    _, pool = fixed_case("della", 1, shape=(10, 64))
    known, together, ranks_of = Statistics(pool), Barrier(2), statistics._ranks_of
    monkeypatch.setattr(statistics, "_ranks_of", lambda *a: (together.wait(10), ranks_of(*a)))
    first, second = Threads(2).map(lambda _: known.ranks((("base", "w"), ("m0", "w")), 64), range(2))
    assert first is second


def test_threads_are_used_only_for_sources_not_yet_examined(monkeypatch):
    """An output layer of a stack may come from one source layer and later from another; a sum needs no statistics of its sources."""
    plan, pool = fixed_case("ties", 3, shape=(10, 64))
    (step,) = plan.steps
    tensors = {(model, layer): pool.tensor(model, "w") for model in ("base", "m0", "m1", "m2") for layer in "ab"}
    batch = FusedBatch(WeightPool.holding(tensors), threads=2)
    in_threads = []
    map_in_threads = Threads.map
    monkeypatch.setattr(Threads, "map", lambda *a: (in_threads.append(True), map_in_threads(*a))[1])

    def uses_threads(step, layer):
        in_threads.clear()
        inputs = tuple(entry._replace(tensor=layer) for entry in step.inputs)
        base = step.base and step.base._replace(tensor=layer)
        batch.prepare([step._replace(inputs=inputs, base=base)], 0, torch.float32)
        return bool(in_threads)

    assert [uses_threads(step, layer) for layer in "aabba"] == [True, False, True, False, False]
    assert not uses_threads(fixed_case("linear", 3, shape=step.shape)[0].steps[0], "a")


def test_nearly_cancelling_directions_use_the_reference():
    """The remainder of their sum is rounding error, which the reference amplifies: to 6e-5 of the result here."""
    tensors = {"base": -0.2550000250339508, "m0": -0.177734375, "m1": -0.353515625}
    pool = WeightPool.holding({(name, "w"): torch.tensor(value) for name, value in tensors.items()})
    inputs = tuple(TensorInput(name, "w", {"weight": 1.5}) for name in ("m0", "m1"))
    shared = {"normalize_weights": False, "eps": 0.0005340758569353588}
    step = TensorStep("w", (), "multislerp", inputs, TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "float32", "float32", 0)
    merged, plain = (next(Merger(pool, fused=fused).tensors(plan))[1] for fused in (True, False))
    assert torch.equal(merged, plain)
    apart = step._replace(inputs=(inputs[0], inputs[1]._replace(parameters={"weight": 0.5})))
    assert fuse(apart, Statistics(pool)) is not None
