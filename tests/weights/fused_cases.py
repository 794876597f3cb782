"""Single-tensor merges for the tests of the compiled kernels: shapes, dtypes, numbers of sources, densities, exact ties in magnitude."""

import math
from dataclasses import replace

import torch
from hypothesis import reject
from hypothesis import strategies as st

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import MergePlan, Region, TensorInput, TensorStep
from evomerge.recipe import BaseRole, Scope, method_spec
from evomerge.weights import Merger, WeightPool
from evomerge.weights.fused import statistics

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LOOSE = ("slerp", "linear", "shifted_linear")
"""methods whose kernels sum in another order, or with another product, than the references"""

BY_DIRECTION = ("nuslerp", "multislerp", "karcher", "model_stock")
"""methods whose references round inner products to float32, the kernels' do not"""


@st.composite
def shapes(draw, edges):
    """Shapes of zero to three dimensions; one-dimensional ones have sizes around `edges`, which are kernel block sizes."""
    sizes = [0, 1, 2, 7, 63, 1000, *[edge + more for edge in edges for more in (-1, 0, 1)]]
    return draw(
        st.one_of(
            st.just(()),
            st.tuples(st.sampled_from(sizes)),
            st.tuples(st.sampled_from([1, 3, 17]), st.sampled_from([1, 5, 64, 97])),
            st.tuples(st.sampled_from([1, 2]), st.sampled_from([3, 8]), st.sampled_from([0, 1, 33])),
        )
    )


def values(spec):
    """Values of one parameter, often at its extremes."""
    if isinstance(spec.default, bool):
        return st.booleans()
    if spec.name == "density":
        return st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-9]), st.floats(0, 1))
    if spec.name == "max_iter":
        return st.sampled_from([0.0, 1.0, 3.0, 10.0])
    if spec.name in ("eps", "tol"):  # the references divide 0 by 0 if it is 0
        return st.floats(1e-9, 1e-3)
    if spec.name == "shift":  # only without a shift is there a fused form
        return st.sampled_from([0.0, 0.5])
    if spec.low is not None and spec.high is None:  # compared with deltas of about 0.1
        return st.one_of(st.floats(spec.low, 1e-3), st.floats(spec.low, 0.2))
    if spec.low is not None:
        return st.floats(spec.low, spec.high)
    return st.sampled_from([1.0, 0.5, 0.0, -0.75, 1.5, 0.3])


@st.composite
def cases(draw, method, edges=(1024, 3072), math_dtype="float32"):
    """A plan with one tensor, and a pool of the tensors it reads."""
    spec = method_spec(method)
    shape = draw(shapes(edges))
    most = spec.max_sources or 16
    n_sources = draw(st.sampled_from([n for n in (1, 2, 3, 4, 5, 8, 16) if spec.min_sources <= n <= most]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    levels = draw(st.sampled_from([0, 3, 1000]))  # few distinct deltas: exact ties everywhere

    def noise(scale):
        if levels:
            return torch.randint(-levels, levels + 1, shape, generator=generator) * (scale / levels)
        return torch.randn(shape, generator=generator) * scale

    names = [f"m{i}" for i in range(n_sources)]
    base = noise(1.0)
    tensors = {("base", "w"): base.to(draw(st.sampled_from(DTYPES)))}
    mixed = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    for name in names:
        tensors[name, "w"] = (base + noise(0.1)).to(draw(st.sampled_from(DTYPES)) if mixed else dtype)
    inputs = tuple(
        TensorInput(name, "w", {p.name: draw(values(p)) for p in spec.parameters if p.scope is Scope.MODEL})
        for name in names
    )
    for parameters in (entry.parameters for entry in inputs if "epsilon" in entry.parameters):
        density = parameters["density"]  # plans keep density +- epsilon within (0, 1)
        parameters["epsilon"] = min(parameters["epsilon"], density / 2, (1 - density) / 2)
    shared = {p.name: draw(values(p)) for p in spec.parameters if p.scope is Scope.GLOBAL}
    if method == "linear" and sum(entry.parameters["weight"] for entry in inputs) == 0:
        shared["normalize"] = False
    if method == "multislerp" and abs(sum(entry.parameters["weight"] for entry in inputs)) < 1e-6:
        shared["normalize_weights"] = False
    needs_base = spec.base is not BaseRole.SOURCE and (spec.base is not BaseRole.OPTIONAL or draw(st.booleans()))
    step = TensorStep("w", shape, method, inputs, TensorInput("base", "w", {}) if needs_base else None, shared)
    out = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    plan = MergePlan((step,), 0, 0, out, math_dtype, draw(st.integers(0, 5)))
    pool = WeightPool.holding(tensors)
    if method == "multislerp":
        try:
            next(Merger(pool, fused=False).tensors(plan))
        except RecipeError:  # directions that cancel
            reject()
    if out == "float16":
        try:
            next(Merger(pool, fused=False).tensors(plan))
        except CheckpointError:  # an entry is divided by weights whose sum is nearly 0
            plan = replace(plan, dtype="float32")
    return plan, pool


def fixed_case(method, n_sources, *, rescale=False, shape=(300, 1000), dtype=torch.bfloat16):
    """A plan with one tensor, in bfloat16 and with the same values each time, and a pool of the tensors it reads.

    Args:
        method: a method.
        n_sources: the maximum number of sources.
        rescale: restore norms, if the method supports it.
        shape: of the tensor.
        dtype: of base and sources.
    """
    spec = method_spec(method)
    generator = torch.Generator().manual_seed(n_sources)
    base = torch.randn(shape, generator=generator)
    names = [f"m{i}" for i in range(min(n_sources, spec.max_sources or n_sources))]
    tensors = {(name, "w"): (base + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for name in names}
    tensors["base", "w"] = base.to(dtype)
    own = {"density": 0.45, "epsilon": 0.2, "gamma": 0.05, "scale": 0.9}
    usual = {"lambda": 0.9, "normalize": True, "rescale": rescale, "shift": False, "t": 0.3, "filter_wise": False}
    usual |= {"nuslerp_flatten": True, "nuslerp_row_wise": False, "normalize_weights": True, "eps": 1e-8}
    usual |= {"max_iter": 10.0, "tol": 1e-5, "r": 0.1, "alpha": 0.2, "select_topk": 0.4}
    usual |= {"epsilon": 0.05}
    scopes = {scope: [p.name for p in spec.parameters if p.scope is scope] for scope in Scope}
    inputs = tuple(
        TensorInput(name, "w", {p: own.get(p, 0.7 - 0.1 * number) for p in scopes[Scope.MODEL]})
        for number, name in enumerate(names)
    )
    shared = {name: usual[name] for name in scopes[Scope.GLOBAL]}
    base_entry = None if spec.base is BaseRole.SOURCE else TensorInput("base", "w", {})
    step = TensorStep("w", shape, method, inputs, base_entry, shared)
    return MergePlan((step,), 0, 0, "bfloat16", "float32", 3), WeightPool.holding(tensors)


def close(fused, plain, plan):
    """Equal to the last bit, or to the last unit where sums are computed in a different order."""
    step = plan.steps[0]
    if step.method in BY_DIRECTION:
        relative = 1e-5 if fused.dtype == torch.float32 else 2**-7
        return torch.allclose(fused.float(), plain.float(), rtol=relative, atol=1e-5)
    if step.method in LOOSE or step.parameters.get("rescale"):
        relative = 1e-6 if fused.dtype == torch.float32 else 2**-7
        return torch.allclose(fused.float(), plain.float(), rtol=relative, atol=1e-6)
    return torch.equal(fused, plain)


def kept_norms_seen(method, monkeypatch, module, merge):
    """The L1 norms (float64) of kept elements from which `module` computes scales when `merge` runs on a plan and a pool.

    Once measured, and once known for every density. The magnitudes vary widely in size, so plain summation would depend on the order.
    """
    plan, _ = fixed_case(method, 2, rescale=True, shape=(300, 1001))
    (step,) = plan.steps
    generator = torch.Generator().manual_seed(0)
    tensors = {("base", "w"): torch.zeros(step.shape)}
    for entry in step.inputs:
        normal, size = (torch.randn(step.shape, generator=generator) for _ in range(2))
        tensors[entry.source, "w"] = normal * torch.exp(4 * size)
    pool = WeightPool.holding(tensors)
    seen = []
    scales = module.scales
    monkeypatch.setattr(
        module, "scales", lambda whole, kept, precision: (seen.append(kept), scales(whole, kept, precision))[1]
    )
    merge(plan, pool)
    monkeypatch.setattr(statistics, "LARGE_TENSOR", 0)
    merge(plan, pool)
    return [kept.reshape(-1).tolist() for kept in seen]


class Views:
    """A target that holds tensors as ranges of flat memory on `device`.

    Each tensor is cut in two at `cut` along dimension `along`, as between two processes of an engine, and starts at `offset`.
    """

    def __init__(self, plan, dtype, *, cut=0.0, offset=0, along=0, device="cpu"):
        self.shapes = {step.output: step.shape for step in plan.steps}
        self.memory = {
            name: torch.full((math.prod(shape) + 2 * offset,), torch.nan, dtype=dtype, device=device)
            for name, shape in self.shapes.items()
        }
        self._cut, self._offset, self._along = cut, offset, along

    def tensor(self, name):
        """What was written to the tensor."""
        regions = self.regions(name)
        if len(regions) == 1:
            return regions[0].view
        return torch.cat([region.view for region in regions], dim=self._dimension(name))

    def untouched(self):
        """Whether nothing was written outside the tensors."""
        outside = [torch.cat([m[: self._offset], m[m.numel() - self._offset :]]) for m in self.memory.values()]
        return all(bool(part.isnan().all()) for part in outside)

    def names(self):
        return list(self.shapes)

    def regions(self, name):
        shape, start, found = self.shapes[name], self._offset, []
        if not shape:
            return [Region((), self.memory[name][start : start + 1].view(()))]
        dimension = self._dimension(name)
        edge = int(self._cut * shape[dimension])
        for part in [slice(0, edge), slice(edge, shape[dimension])] if edge else [slice(0, shape[dimension])]:
            index = tuple(part if d == dimension else slice(0, size) for d, size in enumerate(shape))
            sides = [side.stop - side.start for side in index]
            found.append(Region(index, self.memory[name][start : start + math.prod(sides)].view(sides)))
            start += math.prod(sides)
        return found

    def _dimension(self, name):
        return min(self._along, len(self.shapes[name]) - 1)
