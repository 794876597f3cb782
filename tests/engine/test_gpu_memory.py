"""How much GPU memory vLLM may take. Sizes come from real cases; no GPU is used."""

import logging

import pytest

from evomerge.engine.environment import vllm_targets_cpu
from evomerge.engine.gpu_memory import (
    ENGINE_SPARE_BYTES,
    SOURCE_SPARE_BYTES,
    USABLE_SHARE,
    MemoryNeeds,
    memory_share,
    room_beside,
    source_room,
    vllm_memory_options,
)

H100, H200 = 80 << 30, 141 << 30
MODEL_8B = 16_060_000_000


@pytest.mark.parametrize(("total", "n_models"), [(H200, 4), (H100, 2)])
def test_room_is_reserved_for_sources(total: int, n_models: int) -> None:
    sources = n_models * MODEL_8B

    share = memory_share(total, MemoryNeeds(engine_bytes=MODEL_8B, source_bytes=sources, gpus=1.0))

    assert total * (USABLE_SHARE - share) == pytest.approx(sources + SOURCE_SPARE_BYTES)
    assert room_beside(total, share=share, gpus=1.0) > sources + SOURCE_SPARE_BYTES
    assert total * share >= MODEL_8B + ENGINE_SPARE_BYTES


def test_engine_without_enough_room_takes_all_memory_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        share = memory_share(H100, MemoryNeeds(engine_bytes=MODEL_8B, source_bytes=4 * MODEL_8B, gpus=1.0))

    assert share == pytest.approx(USABLE_SHARE)
    assert room_beside(H100, share=share, gpus=1.0) < MODEL_8B
    assert "64.2 GB of models (and ranks, for della methods) do not fit beside an engine of 16.1 GB" in caplog.text


def test_three_experts_fit_only_without_their_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """64 GB of models next to an engine of 16 GB fit in 103 GB (96 GiB); another 48 GB of ranks do not."""
    sources, ranks = 4 * MODEL_8B, 3 * MODEL_8B

    fitting = memory_share(96 << 30, MemoryNeeds(engine_bytes=MODEL_8B, source_bytes=sources, gpus=1.0))
    with caplog.at_level(logging.WARNING):
        too_much = memory_share(96 << 30, MemoryNeeds(engine_bytes=MODEL_8B, source_bytes=sources + ranks, gpus=1.0))

    assert fitting < too_much
    assert too_much == pytest.approx(USABLE_SHARE)
    assert "candidates will be merged on the CPU: 112.4 GB" in caplog.text


def test_engines_that_share_a_gpu_share_its_memory() -> None:
    share = memory_share(H200, MemoryNeeds(engine_bytes=MODEL_8B, source_bytes=2 * MODEL_8B, gpus=0.5))

    assert share < USABLE_SHARE / 2
    assert room_beside(H200, share=share, gpus=0.5) > 2 * MODEL_8B + SOURCE_SPARE_BYTES
    assert 2 * (H200 * share + 2 * MODEL_8B + SOURCE_SPARE_BYTES) == pytest.approx(USABLE_SHARE * H200)


@pytest.mark.parametrize("gpus", [1.0, 2.0, 0.0])
def test_vllm_takes_its_usual_share_without_sources(gpus: float, caplog: pytest.LogCaptureFixture) -> None:
    assert memory_share(H100, MemoryNeeds(engine_bytes=MODEL_8B, source_bytes=0, gpus=gpus)) == pytest.approx(
        USABLE_SHARE
    )
    assert not caplog.records


@pytest.mark.skipif(not vllm_targets_cpu(), reason="the installed vLLM is not a CPU build")
def test_cpu_engine_has_no_memory_options() -> None:
    assert vllm_memory_options(MemoryNeeds(engine_bytes=1, source_bytes=1, gpus=1.0)) == {}
    assert source_room({}, gpus=1.0) is None


def test_engine_that_takes_all_memory_leaves_no_room() -> None:
    assert room_beside(H100, share=0.9, gpus=0.5) == 0
