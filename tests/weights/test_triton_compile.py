"""Triton's kernels compile for the GPUs they are meant for, which needs no GPU, and what comes out looks as it should."""

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="triton stays out of this environment; `make triton-test` runs this")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evomerge.weights.fused.kernels import BAND, KEEP_ALL, MAGNITUDE, RANDOM
from evomerge.weights.triton import kernels
from evomerge.weights.triton.kernels import BLOCK, N_WARPS, NO_BASE

HOPPER = GPUTarget("cuda", 90, 32)


def compiled(kernel, result_type, **constants):
    constants |= {"K": 3, "KINDS": 0, "BLOCK": BLOCK}
    result = "largest" if kernel is kernels.merge_chunks else "norms"
    signature = {"chunks": "*i64", "integers": "*i64", "floats": "*fp32", result: result_type}
    signature |= dict.fromkeys(constants, "constexpr")
    options = {"num_warps": N_WARPS, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constants, {}), target=HOPPER, options=options)


CASES = {
    "linear": {"BASE": NO_BASE, "MODE": KEEP_ALL, "ELECT": False, "NORMALIZE": False, "DIVIDE": True, "RESCALE": False},
    "task_arithmetic": {"BASE": 0, "MODE": KEEP_ALL, "ELECT": False, "NORMALIZE": False, "DIVIDE": False, "RESCALE": False},
    "ties": {"BASE": 0, "MODE": MAGNITUDE, "ELECT": True, "NORMALIZE": True, "DIVIDE": False, "RESCALE": False},
    "dare_ties": {"BASE": 0, "MODE": RANDOM, "ELECT": True, "NORMALIZE": False, "DIVIDE": False, "RESCALE": True},
    "breadcrumbs": {"BASE": 0, "MODE": BAND, "ELECT": False, "NORMALIZE": False, "DIVIDE": False, "RESCALE": False},
}  # fmt: skip


@pytest.mark.parametrize("method", CASES)
def test_merge_kernel(method):
    constants = CASES[method]
    ptx = compiled(kernels.merge_chunks, "*i32", **constants, OUT=0, ALIGNED=True).asm["ptx"]
    n_tensors = 3 + (constants["BASE"] != NO_BASE)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * n_tensors  # wide loads, with cuts inside and without
    assert "st.global.v4.b32" in ptx
    assert "fma.rn.f32" not in ptx  # the CPU rounds products before it adds them
    assert "div.full.f32" not in ptx
    assert ".ftz" not in ptx  # denormals stay what they are
    # no block is moved between threads: what is shared are the parts of the largest magnitude
    assert len(re.findall(r"st\.shared", ptx)) <= 2


def test_norm_kernel():
    ptx = compiled(kernels.pruned_l1_chunks, "*fp64", BASE=0, MODE=RANDOM).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
