"""Memory is reused once nothing refers to it, and never earlier."""

import mmap
from weakref import WeakSet

import pytest
import torch

from evomerge.weights.warm_memory import WarmMemory

MIB = 1 << 20


@pytest.fixture
def blocks(monkeypatch):
    """The blocks of memory that are held, in use or not."""
    held, make = WeakSet(), mmap.mmap

    def counted(*args, **options):
        block = make(*args, **options)
        held.add(block)
        return block

    monkeypatch.setattr(mmap, "mmap", counted)
    return held


def place_of(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_is_reused():
    memory = WarmMemory()
    first = memory.empty((3, MIB), torch.bfloat16)
    assert first.shape == (3, MIB)
    assert first.dtype is torch.bfloat16
    assert place_of(first) % 4096 == 0
    place = place_of(first)
    del first
    again = memory.empty((5 * MIB // 4,), torch.float32)  # slightly smaller
    assert place_of(again) == place
    assert place_of(memory.empty((MIB, 3), torch.float32)) != place


@pytest.mark.parametrize("keep", [lambda t: t[1:2], lambda t: t.view(torch.int32), lambda t: t.numpy(), lambda t: t.T])
def test_referenced_memory_is_not_reused(keep):
    memory = WarmMemory()
    tensor = memory.empty((4, MIB), torch.float32).fill_(1)
    kept, place = keep(tensor), place_of(tensor)
    del tensor
    other = memory.empty((4, MIB), torch.float32).fill_(2)
    assert place_of(other) != place
    del kept
    assert place_of(memory.empty((4, MIB), torch.float32)) == place


def test_pool_never_exceeds_the_largest_use_at_one_time(blocks):
    memory = WarmMemory()
    for sizes in ((8, 8), (3, 3, 3), (16,), (4, 4, 4, 4), (2, 2)):
        tensors = [memory.empty((size * MIB,), torch.uint8) for size in sizes]
        most = max(16, sum(sizes))
        assert sum(size * MIB for size in sizes) <= sum(map(len, blocks)) <= most * MIB
        del tensors


def test_small_and_empty_tensors_use_no_blocks(blocks):
    memory = WarmMemory()
    assert memory.empty((0, 7), torch.float16).shape == (0, 7)
    assert memory.empty((), torch.float32).shape == ()
    assert not blocks
