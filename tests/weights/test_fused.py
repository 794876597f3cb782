"""The compiled kernels give what the plain references give: random shapes, dtypes, numbers of sources, densities and exact ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.plan import MergePlan, TensorInput, TensorStep
from evomerge.recipe import BaseRole, Scope, method_spec
from evomerge.weights.blocks import BLOCK
from evomerge.weights.fused.magnitudes import STRETCH, MagnitudeHistogram
from evomerge.weights.fused.statistics import MOST_RANKS, Statistics
from evomerge.weights.fused.steps import fuse, fused_methods
from evomerge.weights.fused.tables import CHUNK_ELEMENTS
from evomerge.weights.merger import Merger

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Pool:
    """What the merger needs of a pool."""

    def __init__(self, tensors):
        self.tensors = tensors

    def tensor(self, source, name):
        return self.tensors[source]


def values(spec):
    if isinstance(spec.default, bool):
        return st.booleans()
    if spec.name == "density":
        return st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-9]), st.floats(0, 1))
    if spec.low is not None:
        return st.floats(spec.low, spec.high)
    return st.sampled_from([1.0, 0.5, 0.0, -0.75, 1.5])


@st.composite
def cases(draw, method):
    """A plan of one tensor and the tensors it reads."""
    spec = method_spec(method)
    n_elements = draw(st.sampled_from([0, 1, 2, 7, 63, 64, 1000, BLOCK, BLOCK + 1, 3 * BLOCK - 5]))
    n_sources = 1 if spec.max_sources == 1 else draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    levels = draw(st.sampled_from([0, 3, 1000]))  # few distinct deltas: exact ties everywhere

    def noise(scale):
        if levels:
            return torch.randint(-levels, levels + 1, (n_elements,), generator=generator) * (scale / levels)
        return torch.randn(n_elements, generator=generator) * scale

    names = [f"m{i}" for i in range(n_sources)]
    base = noise(1.0)
    tensors = {"base": base.to(draw(st.sampled_from(DTYPES)))}
    for name in names:
        tensors[name] = (base + noise(0.1)).to(draw(st.sampled_from(DTYPES)))
    inputs = tuple(
        TensorInput(name, "w", {p.name: draw(values(p)) for p in spec.parameters if p.scope is Scope.MODEL})
        for name in names
    )
    for parameters in (entry.parameters for entry in inputs if "epsilon" in entry.parameters):
        density = parameters["density"]  # plans keep density +- epsilon inside (0, 1)
        parameters["epsilon"] = min(parameters["epsilon"], density / 2, (1 - density) / 2)
    shared = {p.name: draw(values(p)) for p in spec.parameters if p.scope is Scope.GLOBAL}
    if method == "linear" and sum(entry.parameters["weight"] for entry in inputs) == 0:
        shared["normalize"] = False
    needs_base = spec.base is not BaseRole.SOURCE
    step = TensorStep("w", (n_elements,), method, inputs, TensorInput("base", "w", {}) if needs_base else None, shared)
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    return MergePlan((step,), 0, 0, dtype, "float32", draw(st.integers(0, 5))), Pool(tensors)


def close(fused, plain, rescaled):
    if rescaled:  # sums of another order: one unit in the last place of the scale
        return torch.allclose(
            fused.float(), plain.float(), rtol=2**-7 if fused.dtype != torch.float32 else 1e-6, atol=1e-6
        )
    return torch.equal(fused, plain)


@pytest.mark.parametrize("method", fused_methods())
def test_fused_equals_reference(method):
    @settings(max_examples=40, deadline=None)
    @given(cases(method))
    def check(case):
        plan, pool = case
        (_, fused), (_, plain) = next(Merger(pool).tensors(plan)), next(Merger(pool, fused=False).tensors(plan))
        loose = method in ("slerp", "linear", "shifted_linear") or bool(plan.steps[0].parameters.get("rescale"))
        assert fused.dtype == plain.dtype
        assert close(fused, plain, loose)

    check()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 4000),
    st.sampled_from([0, 1, 2, 50]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_cut_is_the_stable_sort(n_elements, levels, base_dtype, dtype, seed):
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
        threshold, cutoff = histogram.cut(k)
        kept = (magnitude > threshold) | ((magnitude == threshold) & (index < cutoff))
        expected = torch.zeros(n_elements, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(kept & (magnitude > 0), expected & (magnitude > 0)), k


def test_large_tensors_of_many_stretches_and_chunks():
    n_elements = CHUNK_ELEMENTS + 3 * STRETCH + 17
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(n_elements, generator=generator) * 0.02).bfloat16()
    sources = [(base.float() + torch.randn(n_elements, generator=generator) * 0.001).bfloat16() for _ in range(3)]
    pool = Pool({"base": base} | {f"m{i}": source for i, source in enumerate(sources)})
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
    pool = Pool({name: torch.randn(shape, generator=generator).to(dtype) for name in ("base", "m")})
    inputs = (TensorInput("m", "w", {"weight": 1.0, "density": 0.4, "epsilon": 0.3}),)
    shared = {"lambda": 1.0, "normalize": True, "rescale": False}
    step = TensorStep("w", shape, "della", inputs, TensorInput("base", "w", {}), shared)
    plan = MergePlan((step,), 0, 0, "float32", "float32", 3)
    (_, fused), (_, plain) = next(Merger(pool).tensors(plan)), next(Merger(pool, fused=False).tensors(plan))
    assert torch.equal(fused, plain)


def test_della_of_a_row_of_more_than_16_bits_takes_the_reference():
    tensor = torch.arange(MOST_RANKS + 1, dtype=torch.float32)
    pool = Pool({"base": torch.zeros_like(tensor), "m": tensor})
    inputs = (TensorInput("m", "w", {"weight": 1.0, "density": 0.4, "epsilon": 0.3}),)
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    step = TensorStep("w", tuple(tensor.shape), "della", inputs, TensorInput("base", "w", {}), shared)
    assert fuse(step, tensor.numel(), 0, Statistics(pool)) is None


def test_rescaling_does_not_depend_on_threads():
    n_elements = 3 * CHUNK_ELEMENTS + 5
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n_elements, generator=generator)
    pool = Pool({"base": base, "m": base + 0.1 * torch.randn(n_elements, generator=generator)})
    step = TensorStep(
        "w",
        (n_elements,),
        "dare_ties",
        (TensorInput("m", "w", {"weight": 1.0, "density": 0.5}),),
        TensorInput("base", "w", {}),
        {"lambda": 1.0, "normalize": False, "rescale": True},
    )
    plan = MergePlan((step,), 0, 0, "float32", "float32", 0)
    results = [next(Merger(pool, threads=threads).tensors(plan))[1] for threads in (1, 2, 5)]
    assert all(torch.equal(result, results[0]) for result in results)
