"""The item matrix on disk: for each split a file of float32 rows, one row per evaluation, with columns in the tasks' fixed item order.

A row is durable before the journal refers to it, so a crash leaves at most some unreferenced rows, which are cut off when the store is next opened.
"""

import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.core import JournalError, Split, fsync_folder
from evomerge.search.journal import write_all

Layout = tuple[tuple[str, int], ...]
"""(task, number of items) in column order"""


class ItemStore:
    """Reads and appends item scores under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layouts: dict[Split, Layout] = {}
        self._streams: dict[Split, BinaryIO] = {}
        self._readers: dict[Split, BinaryIO] = {}
        self._waiting: dict[Split, list[bytes]] = {}
        self._n_bytes: dict[Split, int] = {}

    def declare(self, split: Split, layout: Layout) -> None:
        """Set the columns of a split (from the journal, or at its first evaluation)."""
        self._layouts[split] = layout

    def trim(self, split: Split, n_rows: int) -> None:
        """Keep only the first `n_rows` rows, those that the journal refers to.

        Raises:
            JournalError: the file has fewer rows, or cannot be truncated.
        """
        path = self._path(split)
        wanted = n_rows * self._width(split) if n_rows else 0
        size = path.stat().st_size if path.exists() else 0
        if size < wanted:
            raise JournalError(
                f"{path}: has {size} bytes, but the journal refers to {n_rows} rows of {self._width(split)} bytes; restore the file from a backup"
            )
        if size > wanted:
            try:
                with path.open("r+b") as stream:
                    stream.truncate(wanted)
                    os.fsync(stream.fileno())
            except OSError as problem:
                raise JournalError(f"{path}: cannot be truncated ({problem.strerror})") from None

    def write(self, split: Split, scores: Mapping[str, NDArray[np.float32]]) -> tuple[int, str]:
        """Queue one row for the next `commit`; return (row, checksum).

        Raises:
            JournalError: the scores do not match the split's columns.
        """
        layout = self._layouts[split]
        got = tuple((task, len(values)) for task, values in scores.items())
        if got != layout:
            raise JournalError(f"item scores of split {split} have columns {got}, but those of the run are {layout}")
        row = np.concatenate([np.asarray(values, dtype="<f4") for values in scores.values()]).tobytes()
        self._stream(split)
        waiting = self._waiting.setdefault(split, [])
        number = self._n_bytes[split] // len(row) + len(waiting)
        waiting.append(row)
        return number, f"{zlib.crc32(row):08x}"

    def commit(self) -> None:
        """Make all queued rows durable.

        Raises:
            JournalError: the disk is full or the file is no longer writable; the rows since the last commit are lost.
        """
        for split, rows in self._waiting.items():
            content, stream = b"".join(rows), self._streams[split]
            rows.clear()
            try:
                if content:
                    write_all(stream, content)
                    os.fsync(stream.fileno())
            except OSError as problem:
                with suppress(OSError):  # remains of the rows are cut off when the store is next opened
                    os.ftruncate(stream.fileno(), self._n_bytes[split])
                raise JournalError(
                    f"{self._path(split)}: cannot be written ({problem.strerror}); every finished evaluation is saved. Free space and resume the run"
                ) from problem
            self._n_bytes[split] += len(content)

    def read(self, split: Split, row: int, checksum: str) -> dict[str, NDArray[np.float32]]:
        """Task -> (n_items,) scores of one row.

        Raises:
            JournalError: the row is missing or damaged.
        """
        width = self._width(split)
        if split not in self._readers:
            self._readers[split] = self._open(split, "rb")
        content = os.pread(self._readers[split].fileno(), width, row * width)
        if len(content) != width or f"{zlib.crc32(content):08x}" != checksum:
            raise JournalError(f"{self._path(split)}: row {row} is missing or damaged; restore the file from a backup")
        values = np.frombuffer(content, dtype="<f4")
        edges = np.cumsum([count for _, count in self._layouts[split]])[:-1]
        return {task: part for (task, _), part in zip(self._layouts[split], np.split(values, edges), strict=True)}

    def close(self) -> None:
        """Close the files."""
        for streams in (self._streams, self._readers):
            for stream in streams.values():
                stream.close()
            streams.clear()

    def _path(self, split: Split) -> Path:
        return self._folder / f"items.{split.value}.f32"

    def _width(self, split: Split) -> int:
        return 4 * sum(count for _, count in self._layouts[split])

    def _stream(self, split: Split) -> BinaryIO:
        if split not in self._streams:
            self._streams[split] = self._open(split, "ab")
            self._n_bytes[split] = self._path(split).stat().st_size
            fsync_folder(self._folder)
        return self._streams[split]

    def _open(self, split: Split, mode: Literal["rb", "ab"]) -> BinaryIO:
        try:
            return self._path(split).open(mode, buffering=0)
        except OSError as problem:
            raise JournalError(f"{self._path(split)}: cannot be opened ({problem.strerror})") from None
