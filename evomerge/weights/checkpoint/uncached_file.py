"""`UncachedFile`: a new file that bypasses the page cache if the system supports it.

A merged model is written once, completely, and then flushed; passing gigabytes through the cache costs memory, a copy and, on many
virtual machines, most of the time. Knows nothing of models.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

_BUFFER_BYTES = 8 << 20

BLOCK_BYTES = 4096
"""alignment of the lengths, memory addresses and file offsets of uncached writes"""

_LEAST_DIRECT_BYTES = 1 << 20
"""minimum size of data that is written without buffering, if it is aligned"""


class UncachedFile:
    """Collects data in a page-aligned buffer, as uncached writes require, unless the data is large and aligned itself.

    Args:
        path: the file; replaced if it exists.

    Raises:
        OSError: the file cannot be written (from every method).
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as problem:
            if problem.errno != errno.EINVAL:  # file systems in memory have no uncached writes
                raise
            self._file = os.open(path, flags, 0o666)
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._filled = 0
        self._n_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        view = memoryview(data).cast("B")
        self._n_bytes += len(view)
        if len(view) >= _LEAST_DIRECT_BYTES and self._filled % BLOCK_BYTES == 0 and _starts_at_a_block(view):
            self._empty(self._filled)
            direct = len(view) - len(view) % BLOCK_BYTES
            self._put(view[:direct])
            view = view[direct:]
        while len(view):
            part = view[: _BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == _BUFFER_BYTES:
                self._empty(_BUFFER_BYTES)

    def __enter__(self) -> "UncachedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if problem is None:
                self._empty(-(-self._filled // BLOCK_BYTES) * BLOCK_BYTES)
                os.ftruncate(self._file, self._n_bytes)  # removes the padding of the last block
        finally:
            os.close(self._file)
            self._buffer.close()

    def _empty(self, n_bytes: int) -> None:
        """Write the first `n_bytes` of the buffer."""
        with memoryview(self._buffer) as buffer, buffer[:n_bytes] as filled:
            self._put(filled)
        self._filled = 0

    def _put(self, view: memoryview) -> None:
        """Write whole blocks."""
        done = 0
        while done < len(view):
            with view[done:] as rest:
                try:
                    done += os.write(self._file, rest)
                except OSError as problem:
                    uncached = fcntl.fcntl(self._file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
                    if problem.errno != errno.EINVAL or not uncached:
                        raise
                    # it could be opened but not written uncached: other block sizes, some network file systems
                    fcntl.fcntl(self._file, fcntl.F_SETFL, 0)


def _starts_at_a_block(view: memoryview) -> bool:
    return int(np.frombuffer(view, np.uint8).ctypes.data) % BLOCK_BYTES == 0
