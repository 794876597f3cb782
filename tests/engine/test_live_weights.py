"""vLLM must compute with the weights that are replaced: views under other names, copies, rearranged experts, and a machine without a GPU.

The test modules are small and hold their weights as vLLM's modules do on a GPU.
"""

from types import SimpleNamespace

import pytest
import torch

from evomerge.core import EngineError
from evomerge.engine import engine_environment
from evomerge.engine.vllm_weights import check_no_copies, check_plain_experts, without_aliases
from evomerge.testing.engines import cannot_start

needs_vllm = pytest.mark.skipif(bool(cannot_start("vllm")), reason=cannot_start("vllm"))


def parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)


class Attention(torch.nn.Module):
    """Has a parameter `sinks`, and an implementation that computes with the tensor `used`."""

    def __init__(self, sinks: torch.Tensor, used: torch.Tensor) -> None:
        super().__init__()
        self.sinks = parameter(sinks)
        self.impl = SimpleNamespace(sinks=used)


def test_each_memory_location_is_found_once() -> None:
    """`W_UK_T` and `W_UV` are views of the transposed `kv_b_proj`; the interleaved rows of one buffer do not hide each other."""
    weight = torch.randn(4 * (3 + 5), 16)
    halves = weight.T.view(16, 4, 8).split([3, 5], dim=-1)
    whole = torch.randn(6, 8)
    tensors = {
        "W_UV": halves[1].transpose(0, 1),
        "W_UK_T": halves[0].permute(1, 2, 0),
        "kv_b_proj": weight,
        "conv_weights": whole.view(6, 8),
        "conv1d": whole.view(6, 1, 8),
        "even": (rows := torch.randn(7, 4))[::2],
        "odd": rows[1::2],
        "none": torch.empty(0),
    }

    assert list(without_aliases(tensors)) == ["kv_b_proj", "conv_weights", "even", "odd", "none"]


@pytest.mark.parametrize(
    "copy",
    [
        lambda sinks: sinks.float(),
        lambda sinks: sinks.flip(0).reshape(2, 4),
    ],
    ids=["in another precision", "in another order"],
)
def test_copy_used_in_computation_is_refused(copy) -> None:
    sinks = torch.randn(8).bfloat16()
    model = torch.nn.ModuleDict({"layer": Attention(sinks, copy(sinks))})
    with pytest.raises(EngineError, match=r"copy of parameter 'layer\.sinks' \(layer\.impl\.sinks\)"):
        check_no_copies(model)


def test_copy_held_by_a_composed_backend_is_refused() -> None:
    """As in vLLM's `TRITON_FLASHINFER`, which contains one implementation of each kind."""
    sinks = torch.randn(8).bfloat16()
    attention = Attention(sinks, sinks)
    attention.impl = SimpleNamespace(causal_impl=SimpleNamespace(sinks=sinks.float()))
    with pytest.raises(EngineError, match=r"\(layer\.impl\.causal_impl\.sinks\)"):
        check_no_copies(torch.nn.ModuleDict({"layer": attention}))


def test_tensors_that_are_not_copies_are_accepted() -> None:
    sinks = torch.randn(8).bfloat16()
    shared, other, constant = (
        Attention(sinks, sinks),
        Attention(sinks, torch.randn(8)),
        Attention(torch.ones(8), torch.ones(8)),
    )
    shared.impl.sinks = shared.sinks
    for model in (shared, other, constant):
        check_no_copies(model)


@needs_vllm
def test_experts_rearranged_by_a_backend_are_refused() -> None:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, map_unquantized_backend

    model = torch.nn.ModuleDict({"experts": torch.nn.Module()})

    def kept_as(backend: UnquantizedMoeBackend) -> None:
        model["experts"].quant_method = SimpleNamespace(unquantized_backend=backend)
        check_plain_experts(model)

    kept_as(map_unquantized_backend("triton"))
    for backend in (UnquantizedMoeBackend.FLASHINFER_TRTLLM, UnquantizedMoeBackend.FLASHINFER_CUTLASS):
        with pytest.raises(
            EngineError, match=r"'experts' stores its experts in the layout of FlashInfer.*moe_backend: triton"
        ):
            kept_as(backend)


@needs_vllm
def test_moe_backend_requested_for_gpus_keeps_experts_as_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
        convert_to_unquantized_kernel_format,
        map_unquantized_backend,
    )

    from evomerge.engine.vllm_engine import VllmEngine

    monkeypatch.setattr("evomerge.engine.vllm_engine.vllm_targets_cpu", lambda: False)
    asked = VllmEngine._arguments(dtype="auto")["moe_backend"]
    assert EngineArgs(model="m", moe_backend=asked).moe_backend == asked
    weights = torch.randn(2, 8, 4), torch.randn(2, 4, 4)
    converted = convert_to_unquantized_kernel_format(map_unquantized_backend(asked), SimpleNamespace(), *weights)
    assert [value.data_ptr() for value in converted] == [value.data_ptr() for value in weights]


@needs_vllm
def test_gpu_build_on_a_machine_without_gpu_is_refused_with_an_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.interface import UnspecifiedPlatform

    from evomerge.engine import MemoryNeeds, vllm_memory_options

    monkeypatch.setattr("evomerge.engine.gpu_memory.vllm_targets_cpu", lambda: False)
    monkeypatch.setattr("vllm.platforms._current_platform", UnspecifiedPlatform())
    with pytest.raises(EngineError, match="vLLM sees no GPU"):
        vllm_memory_options(MemoryNeeds(engine_bytes=1, source_bytes=1, gpus=1.0))


def test_engine_processes_communicate_on_the_loopback_interface() -> None:
    variables = engine_environment()
    assert {variables["GLOO_SOCKET_IFNAME"], variables["NCCL_SOCKET_IFNAME"]} == {"lo"}
