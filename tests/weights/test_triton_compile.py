"""Triton's kernels compile for the target GPUs, for which no GPU is needed, and the compiled code has the expected properties."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton stays out of this environment; `make triton-test` runs this")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evomerge.plan import TensorInput, TensorStep
from evomerge.weights import WeightPool
from evomerge.weights.fused.batch import Destination
from evomerge.weights.fused.blocks import BF16, F16, F32
from evomerge.weights.fused.kernels import BAND, KEEP_ALL, MAGNITUDE, RANDOM, RANKED
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import fuse
from evomerge.weights.triton import batch, kernels
from evomerge.weights.triton.kernels import BLOCK, N_WARPS, NO_BASE
from evomerge.weights.windows import Window, whole


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """Compiles everything from scratch, and leaves nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


HOPPER = GPUTarget("cuda", 90, 32)


def compiled(kernel, result_type, **constants):
    constants = {"K": 3, "KINDS": 0, "PRECISION": F32, "BLOCK": BLOCK} | constants
    if kernel is kernels.merge_chunks:
        constants = {"STRIDED": False} | constants
    result = "largest" if kernel is kernels.merge_chunks else "norms"
    signature = {"chunks": "*i64", "integers": "*i64", "floats": "*fp32", result: result_type}
    signature |= dict.fromkeys(constants, "constexpr")
    options = batch.merge_options(constants["K"], constants["KINDS"], constants["BASE"], constants["MODE"])
    return triton.compile(ASTSource(kernel, signature, constants, {}), target=HOPPER, options=options)


CASES = {
    "linear": {"BASE": NO_BASE, "MODE": KEEP_ALL, "ELECT": False, "NORMALIZE": False, "DIVIDE": True, "RESCALE": False},
    "task_arithmetic": {"BASE": 0, "MODE": KEEP_ALL, "ELECT": False, "NORMALIZE": False, "DIVIDE": False, "RESCALE": False},
    "ties": {"BASE": 0, "MODE": MAGNITUDE, "ELECT": True, "NORMALIZE": True, "DIVIDE": False, "RESCALE": False},
    "dare_ties": {"BASE": 0, "MODE": RANDOM, "ELECT": True, "NORMALIZE": False, "DIVIDE": False, "RESCALE": True},
    "della": {"BASE": 0, "MODE": RANKED, "ELECT": True, "NORMALIZE": True, "DIVIDE": False, "RESCALE": True},
    "breadcrumbs": {"BASE": 0, "MODE": BAND, "ELECT": False, "NORMALIZE": False, "DIVIDE": False, "RESCALE": False},
}  # fmt: skip


@pytest.mark.parametrize("method", CASES)
def test_merge_kernel_compiles_as_expected(method):
    constants = CASES[method]
    ptx = compiled(kernels.merge_chunks, "*i32", **constants, OUT=0, ALIGNED=True).asm["ptx"]
    n_tensors = 3 + (constants["BASE"] != NO_BASE) + (3 if constants["MODE"] == RANKED else 0)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * n_tensors  # wide loads, with cuts inside and without
    assert "st.global.v4.b32" in ptx
    assert "fma.rn.f32" not in ptx  # the CPU rounds products before it adds them
    assert "div.full.f32" not in ptx
    assert ".ftz" not in ptx  # denormals are preserved
    assert "cvt.rn.bf16" in ptx  # to nearest even
    # no block is exchanged between threads: only partial results for the largest magnitude are shared
    assert len(re.findall(r"st\.shared", ptx)) <= 2


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_masks_of_columns_take_one_division_per_eight_elements(method):
    """A 32-bit division, one for all inputs, both in the loop with edge masks and in the loop without."""
    plain, strided = (
        compiled(kernels.merge_chunks, "*i32", **CASES[method], OUT=0, ALIGNED=True, STRIDED=strided).asm["ptx"]
        for strided in (False, True)
    )
    assert "div.u32" not in plain
    assert len(re.findall(r"div\.u32", strided)) == 2
    assert "div.u64" not in strided
    assert len(re.findall(r"ld\.global\.v4\.b32", strided)) == len(re.findall(r"ld\.global\.v4\.b32", plain))


@pytest.mark.parametrize("precision", [BF16, F16])
@pytest.mark.parametrize("method", ["linear", "ties", "della"])
def test_merge_kernel_keeps_intermediate_rounding(method, precision):
    """Rounding steps are not optimised away, and no operations are fused across them."""
    ptx = compiled(kernels.merge_chunks, "*i32", **CASES[method], OUT=0, ALIGNED=True, PRECISION=precision).asm["ptx"]
    assert ("cvt.rn.f16.f32" in ptx) == (precision == F16)
    assert "fma.rn" not in ptx
    assert ".ftz" not in ptx


@pytest.mark.parametrize(("mode", "n_tensors"), [(RANDOM, 2), (RANKED, 3)])
def test_norm_kernel_compiles(mode, n_tensors):
    ptx = compiled(kernels.pruned_l1_chunks, "*fp64", BASE=0, MODE=mode).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 3 * n_tensors


def counter():
    """The instruction-counting benchmark, as a module."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "merge_gpu_instructions.py"
    spec = importlib.util.spec_from_file_location("merge_gpu_instructions", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COUNTER = counter()


@pytest.mark.parametrize("row", [row for row, constants in COUNTER.METHODS.items() if "PRECISION" not in constants])
def test_kernels_are_memory_bound(row):
    """On an H200: the processors' units have spare time while data moves, and at least 24 warps are active."""
    found = COUNTER.count(row)
    assert found.instructions > 10
    assert 0.2 < found.busiest()[1] < 0.9
    assert found.warps >= 24


@pytest.mark.parametrize("n_inputs", [3, 8])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_kernels_do_not_spill_registers(method, n_inputs, tmp_path):
    """Within the register limit set at launch, nothing is spilled to memory."""
    (tmp_path / "cubin").write_bytes(
        compiled(kernels.merge_chunks, "*i32", **CASES[method], K=n_inputs, OUT=0, ALIGNED=True).asm["cubin"]
    )
    resources = COUNTER._cuobjdump("-res-usage", tmp_path / "cubin")
    assert int(re.search(r"REG:(\d+)", resources)[1]) <= (64 if n_inputs == 3 else 128)
    assert "STACK:0 " in resources


class Driver:
    """What Triton asks the GPU driver for before it compiles."""

    def get_current_target(self):
        return HOPPER

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.mark.parametrize("window", [whole(3 * BLOCK + 5), Window(16, 24, 128, 32)])
@pytest.mark.parametrize("method", ["linear", "dare_ties", "della"])
def test_launches_of_the_merger_fit_the_kernels(method, window, monkeypatch):
    """Arguments, constants and options of a launch fit the kernels; only the launch itself is omitted."""
    compiled_kernels = []

    def warmed_up(kernel, n_programs):
        return lambda *arguments, **constants: compiled_kernels.append(
            kernel.warmup(*arguments, grid=(n_programs,), **constants)
        )

    monkeypatch.setattr(batch, "_kernel", warmed_up)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    pool = WeightPool.holding({(name, "w"): torch.rand(3 * BLOCK + 5) for name in ("base", "a", "b")})
    inputs = tuple(TensorInput(name, "w", {"weight": 1.0, "density": 0.5, "epsilon": 0.1}) for name in "ab")
    base = None if method == "linear" else TensorInput("base", "w", {})
    shared = {"lambda": 1.0, "normalize": True, "rescale": True}
    step = TensorStep("w", (3 * BLOCK + 5,), method, inputs, base, shared)
    form = fuse(step, Statistics(pool))
    merge = batch.TritonBatch(pool, torch.device("cpu"))
    window = merge.covering(form, window, whole(step.n_elements))
    assert merge.ready([(form, window)])
    merge.run([[Destination(step, form, window, torch.empty(window.n_elements), False)]])
    assert len(compiled_kernels) == (1 if method == "linear" else 2)
    for kernel in compiled_kernels:
        assert kernel.metadata.num_warps == N_WARPS
        assert not kernel.metadata.enable_fp_fusion
