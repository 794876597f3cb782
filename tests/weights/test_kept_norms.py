"""Norms of the elements that random masks keep: norms known for every density equal measured norms to the last bit, in any summation order."""

import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from fused_cases import cases, fixed_case, kept_norms_seen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evomerge.core import CheckpointError
from evomerge.plan import MergePlan
from evomerge.weights.fused import batch, statistics
from evomerge.weights.fused.blocks import BLOCK, F32
from evomerge.weights.fused.lanes import LANES
from evomerge.weights.fused.norms import addend_grid, kept_norms
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import fuse
from evomerge.weights.fused.tables import delta_of
from evomerge.weights.merger import Merger
from evomerge.weights.philox import DECISIONS, random_halves
from evomerge.weights.task_vectors import TINY_SUM


def merged(merger: Merger, plan: MergePlan) -> object:
    """The numbers of a plan's first tensor, or the reason it is refused: weights whose sum is nearly 0 may make it overflow."""
    try:
        return next(merger.tensors(plan))[1].tolist()
    except CheckpointError as problem:
        return str(problem)


@pytest.mark.parametrize(
    ("method", "math_dtype"), [("dare_ties", "float32"), ("dare_linear", "bfloat16"), ("della", "float32")]
)
def test_norms_known_for_every_density_equal_measured_norms(method, math_dtype, monkeypatch):
    """Bit for bit, even after the seed changes: a resident merger gives the same result as a single merge."""
    known = []
    kept_l1 = Statistics.kept_l1

    def noted(self, *mask):
        known.append(kept_l1(self, *mask) is not None)
        return kept_l1(self, *mask)

    monkeypatch.setattr(statistics, "LARGE_TENSOR", 0)
    monkeypatch.setattr(Statistics, "kept_l1", noted)

    @settings(max_examples=60)
    @given(
        cases(method, math_dtype=math_dtype),
        st.lists(
            st.tuples(st.integers(0, 2), st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.1])), min_size=1, max_size=4
        ),
    )
    def check(case, candidates):
        plan, pool = case
        (step,) = plan.steps
        resident = Merger(pool, threads=2)
        for seed, density, epsilon in [*candidates, (0, 0.5, 0.1), (0, 0.5, 0.05)]:
            chosen = (
                {"density": 0.11 + 0.78 * density, "epsilon": epsilon} if method == "della" else {"density": density}
            )
            inputs = [entry._replace(parameters={**entry.parameters, **chosen}) for entry in step.inputs]
            candidate = step._replace(inputs=tuple(inputs), parameters={**step.parameters, "rescale": True})
            candidate_plan = replace(plan, steps=(candidate,), seed=seed)
            assert merged(resident, candidate_plan) == merged(Merger(pool, once=True), candidate_plan)

    check()
    assert set(known) == {True, False}


def test_norms_of_dare_and_della_are_known_at_the_same_time(monkeypatch):
    """Their masks have the same keys if the recipes have the same seed."""
    monkeypatch.setattr(statistics, "LARGE_TENSOR", 0)
    plan, pool = fixed_case("della", 2, rescale=True, shape=(30, 64))
    (step,) = plan.steps
    known = Statistics(pool)
    for method in ("dare_ties", "della", "dare_ties"):
        form = fuse(step._replace(method=method), known)
        assert all(norms.kept is not None for norms in form.norms.values())


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_measured_norms_equal_known_norms_to_the_last_bit(method, monkeypatch):
    measured, known = kept_norms_seen(method, monkeypatch, batch, lambda plan, pool: next(Merger(pool).tensors(plan)))
    assert measured == known
    assert all(norm > 0 for norm in known)


@pytest.mark.parametrize("n_elements", [1, 63, 64, 2 * BLOCK + 77])
@pytest.mark.parametrize("step", [0.0, 1.3])
def test_kept_norms_are_sums_of_magnitudes(n_elements, step):
    generator = torch.Generator().manual_seed(0)
    base, tensor = (torch.randn(n_elements, generator=generator) for _ in range(2))
    numbers, magnitudes = random_halves((3, 5), 0, n_elements), (tensor - base).abs().double().numpy()
    grid = addend_grid(magnitudes.sum())
    ranks = np.arange(n_elements + LANES, dtype=np.uint16)
    more = (ranks[:n_elements].astype(np.float32) * np.float32(step)).astype(np.int64)
    address = ranks.ctypes.data if step else 0
    found = kept_norms(delta_of(base, tensor, F32), n_elements, 3, 5, address, np.float32(step), grid)
    for keep in (1, 300, 30_000, DECISIONS - 1, DECISIONS):
        exact = math.fsum(magnitudes[numbers < keep + more])
        assert found[keep] == pytest.approx(exact, rel=0, abs=n_elements * 2.0**-52 * magnitudes.sum())
    assert found[DECISIONS] > 0


@settings(max_examples=60)
@example([0.5, 2.0**-52, 2.0**-52], Random(0))
@given(st.lists(st.floats(0, 2.0**60, width=32), min_size=2, max_size=50), st.randoms(use_true_random=False))
def test_sums_on_the_grid_do_not_depend_on_the_order(addends, random):
    grid = addend_grid(sum(addends))
    rounded = [(addend + grid) - grid for addend in addends]
    total = sum(rounded)
    if grid:
        assert total == math.fsum(rounded)
        # the error of each is at most half of 2^-51 of a power of two that is at most twice the sum
        assert abs(total - math.fsum(addends)) <= len(addends) * 2.0**-51 * math.fsum(addends)
        random.shuffle(rounded)
        assert sum(rounded) == total
    else:
        assert sum(addends) < TINY_SUM
