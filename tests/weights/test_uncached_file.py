"""Files written past the page cache contain what was written, for any size and file system."""

import mmap
from pathlib import Path

import pytest

from evomerge.weights.checkpoint.uncached_file import UncachedFile

MIB = 1 << 20
SHM = Path("/dev/shm")  # noqa: S108


@pytest.mark.parametrize(
    "sizes", [(0,), (1,), (4096,), (4095, 2), (8 * MIB,), (8 * MIB - 1, 3, 9 * MIB), (5, 17 * MIB + 1)]
)
def test_file_contains_what_was_written(tmp_path, sizes):
    pieces = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    with UncachedFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(piece)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_page_aligned_memory_is_written_directly(tmp_path):
    """Large page-aligned pieces are not buffered first, whatever the position in the file."""
    page = mmap.mmap(-1, 3 * MIB)
    page.write(bytes(range(256)) * (3 * MIB // 256))
    view = memoryview(page)
    pieces = [view, b"x" * 4096, view[: 2 * MIB + 5], b"y" * 4091, view, view[4096:], b"z", view, view[1:]]
    with UncachedFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(piece)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


@pytest.mark.skipif(not SHM.is_dir(), reason="no file system in memory here")
def test_file_systems_without_uncached_writes_are_supported(tmp_path):
    path = SHM / tmp_path.name
    try:
        with UncachedFile(path) as file:
            file.write(b"x" * 5000)
        assert path.read_bytes() == b"x" * 5000
    finally:
        path.unlink(missing_ok=True)


def test_errors_on_opening_and_writing_are_raised(tmp_path):
    with pytest.raises(FileNotFoundError):
        UncachedFile(tmp_path / "none" / "file")
    with pytest.raises(OSError, match="No space left"), UncachedFile(Path("/dev/full")) as file:
        file.write(b"x")
