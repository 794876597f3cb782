"""The GPU's kernels store the same bits as the CPU's kernels: `pytest -m gpu` on a machine with a GPU.

Tests that need no GPU are in `test_triton_kernels.py` and `test_triton_left_to_cpu.py`.
"""

import logging
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (requirements/gpu.txt has it)")
if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, and no TRITON_INTERPRET=1", allow_module_level=True)

from fused_cases import Views, fixed_case

from evomerge.plan import TensorInput
from evomerge.weights import Merger, WeightPool, gpu_methods
from evomerge.weights.triton.batch import MAX_INPUTS, TritonBatch, obstacle
from evomerge.weights.triton.kernels import BLOCK, CHUNK_BLOCKS
from evomerge.weights.triton.resident import ResidentSources
from evomerge.weights.windows import whole as all_of

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")

CASES = [(method, 3) for method in gpu_methods()] + [(name, MAX_INPUTS) for name in ("linear", "ties", "della")]


def written(plan, pool, monkeypatch, dtype=torch.bfloat16, **options):
    """What the GPU writes for `plan`, copied to the CPU; fails if the CPU did the merge."""
    monkeypatch.setattr("evomerge.weights.fused.batch.FusedBatch.run", None)
    target = Views(plan, dtype, device=GPU, **options)
    Merger(pool).write(plan, target)
    assert target.untouched()
    return target.tensor("w").cpu()


def expected(plan, pool):
    return next(Merger(pool).tensors(plan))[1]


def test_kernels_run_on_this_gpu():
    assert obstacle(GPU) is None


@pytest.mark.parametrize(("method", "n_sources"), CASES)
def test_gpu_gives_the_same_bits_as_the_cpu(method, n_sources, monkeypatch):
    plan, pool = fixed_case(method, n_sources)
    whole = expected(plan, pool)
    assert torch.equal(written(plan, pool, monkeypatch, cut=0.4, offset=1), whole)
    assert torch.equal(written(plan, pool, monkeypatch, offset=8), whole)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", gpu_methods())
def test_columns_of_a_multi_process_engine_match_the_cpu(method, rescale, monkeypatch):
    plan, pool = fixed_case(method, 3, rescale=rescale, shape=(300, 3584))
    whole = expected(plan, pool)
    assert torch.equal(written(plan, pool, monkeypatch, cut=0.25, along=1), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della"])
def test_every_model_dtype_matches_the_cpu(method, dtype, monkeypatch):
    plan, pool = fixed_case(method, 3, dtype=dtype)
    whole = expected(plan, pool)
    assert torch.equal(written(plan, pool, monkeypatch, torch.float32), whole.float())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "breadcrumbs"])
def test_every_recipe_precision_matches_the_cpu(method, precision, monkeypatch):
    plan, pool = fixed_case(method, 3)
    plan = replace(plan, math_dtype=precision)
    whole = expected(plan, pool)
    assert torch.equal(written(plan, pool, monkeypatch, cut=0.4, offset=1), whole)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs"])
def test_restored_norms_match_the_cpu(method, monkeypatch):
    plan, pool = fixed_case(method, 3, rescale=True)
    whole = expected(plan, pool)
    assert torch.equal(written(plan, pool, monkeypatch), whole)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "ties"])
def test_tensors_of_many_chunks_match_the_cpu(method, monkeypatch):
    plan, pool = fixed_case(method, 2, shape=(40, 3 * BLOCK * CHUNK_BLOCKS // 8 + 5))
    whole = expected(plan, pool)
    assert torch.equal(written(plan, pool, monkeypatch), whole)


def test_running_engine_computation_sees_the_old_weights():
    """In its own stream, as in vLLM; work that starts after the write sees the new weights."""
    plan, pool = fixed_case("linear", 3)
    target, merger = Views(plan, torch.bfloat16, device=GPU), Merger(pool)
    merger.write(plan, target)  # compiles
    weights = target.tensor("w")
    weights.zero_()
    torch.cuda.synchronize()
    before, after = torch.empty_like(weights), torch.empty_like(weights)
    engine = torch.cuda.Stream()
    with torch.cuda.stream(engine):
        torch.cuda._sleep(1_000_000_000)  # half a second
        before.copy_(weights)
    merger.write(plan, target)
    with torch.cuda.stream(engine):
        after.copy_(weights)
    torch.cuda.synchronize()
    assert not before.any()
    assert torch.equal(after.cpu(), expected(plan, pool))


def test_dropped_copies_free_their_memory():
    n_bytes = 256 << 20
    resident = ResidentSources(WeightPool.holding({("m", "w"): torch.zeros(n_bytes // 2, dtype=torch.bfloat16)}), GPU)
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    assert resident.hold([(TensorInput("m", "w", {}), all_of(n_bytes // 2))])
    assert torch.cuda.mem_get_info()[0] <= before - n_bytes
    resident.drop()
    assert torch.cuda.mem_get_info()[0] > before - n_bytes


def test_gpu_without_room_leaves_the_merge_to_the_cpu(caplog, monkeypatch):
    monkeypatch.setattr("evomerge.weights.triton.resident.SPARE_BYTES", 1 << 50)
    monkeypatch.setattr(TritonBatch, "_launch", None)
    plan, pool = fixed_case("della", 3)
    target = Views(plan, torch.bfloat16, device=GPU)
    with caplog.at_level(logging.WARNING):
        Merger(pool).write(plan, target)
    assert torch.equal(target.tensor("w").cpu(), expected(plan, pool))
    assert "gpu_memory_utilization" in caplog.text
