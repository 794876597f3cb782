"""`WarmMemory`: reusable memory for tensors, because memory that is new to a process is slow.

The system clears every page when it is first touched, with one page fault each: reading a file from the page cache into new memory takes
several times as long as into memory used before. Knows nothing of models.
"""

import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch

_LEAST_BYTES = 2 << 20
"""smaller tensors are allocated by torch, which reuses their memory anyway"""

_MOST_WASTE = 1.25
"""maximum ratio of the size of a block to that of the tensor it is used for"""


class WarmMemory:
    """Allocates tensors whose memory can be reused as soon as nothing refers to them. Safe to use from several threads.

    The total memory, including blocks kept for reuse, never exceeds the maximum that was in use at one time.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._free: list[mmap.mmap] = []
        self._returned: deque[mmap.mmap] = deque()  # filled by finalizers, which can run anywhere, so without a lock
        self._used = 0
        self._most_used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in CPU memory."""
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        if n_bytes < _LEAST_BYTES:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            block = self._block(n_bytes)
        # torch keeps this array, not the block, and drops it together with the last tensor that shares its memory
        array = np.frombuffer(block, np.uint8, n_bytes)
        weakref.finalize(array, self._returned.append, block).atexit = False
        return torch.from_numpy(array).view(dtype).reshape(shape)

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._free.append(block)
            self._used -= len(block)

    def _block(self, n_bytes: int) -> mmap.mmap:
        self._take_back()
        fitting = [block for block in self._free if n_bytes <= len(block) <= _MOST_WASTE * n_bytes]
        if fitting:
            block = min(fitting, key=len)
            self._free.remove(block)
        else:
            room = self._most_used - self._used - n_bytes
            while self._free and sum(map(len, self._free)) > room:
                del self._free[0]  # the block that has been idle longest
            block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._used += len(block)
        self._most_used = max(self._most_used, self._used)
        return block
