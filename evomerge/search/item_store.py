"""The item matrix on disk: for each split a file of float32 rows, one evaluation a row, columns in the tasks' fixed item order.

A row is durable before the journal names it, so a crash leaves at most one unnamed row, which the next opening cuts off.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from evomerge.core import JournalError, Split, fsync_folder

Layout = tuple[tuple[str, int], ...]
"""(task, number of items) in column order"""


class ItemStore:
    """Reads and appends item scores under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layouts: dict[Split, Layout] = {}
        self._streams: dict[Split, BinaryIO] = {}

    def layout(self, split: Split) -> Layout | None:
        """The columns of a split; None before its first row."""
        return self._layouts.get(split)

    def declare(self, split: Split, layout: Layout) -> None:
        """Fixes the columns of a split (from the journal, or at its first evaluation)."""
        self._layouts[split] = layout

    def trim(self, split: Split, n_rows: int) -> None:
        """Keeps the first `n_rows` rows: those the journal names.

        Raises:
            JournalError: the file has fewer.
        """
        path = self._path(split)
        wanted = n_rows * self._width(split)
        size = path.stat().st_size if path.exists() else 0
        if size < wanted:
            raise JournalError(
                f"{path}: {size} bytes, but the journal names {n_rows} rows of {self._width(split)} bytes; restore the file from a backup"
            )
        if size > wanted:
            with path.open("r+b") as stream:
                stream.truncate(wanted)
                os.fsync(stream.fileno())

    def append(self, split: Split, scores: Mapping[str, NDArray[np.float32]]) -> tuple[int, str]:
        """Writes one row and returns (row, checksum) when it is durable.

        Raises:
            JournalError: the scores do not have the split's columns, or the disk is full.
        """
        layout = self._layouts[split]
        got = tuple((task, len(values)) for task, values in scores.items())
        if got != layout:
            raise JournalError(f"item scores of split {split} have columns {got}, the run has {layout}")
        row = np.concatenate([np.asarray(values, dtype="<f4") for values in scores.values()]).tobytes()
        stream = self._stream(split)
        position = stream.tell()
        try:
            stream.write(row)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as problem:
            raise JournalError(
                f"{self._path(split)}: cannot be written ({problem.strerror}); nothing finished is lost. Free space and resume the run"
            ) from problem
        return position // len(row), f"{zlib.crc32(row):08x}"

    def read(self, split: Split, row: int, checksum: str) -> dict[str, NDArray[np.float32]]:
        """Task -> (n_items,) scores of one row.

        Raises:
            JournalError: the row is missing or damaged.
        """
        width = self._width(split)
        with self._path(split).open("rb") as stream:
            stream.seek(row * width)
            content = stream.read(width)
        if len(content) != width or f"{zlib.crc32(content):08x}" != checksum:
            raise JournalError(f"{self._path(split)}: row {row} is damaged")
        values = np.frombuffer(content, dtype="<f4")
        edges = np.cumsum([count for _, count in self._layouts[split]])[:-1]
        return {task: part for (task, _), part in zip(self._layouts[split], np.split(values, edges), strict=True)}

    def close(self) -> None:
        """Closes the files."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def _path(self, split: Split) -> Path:
        return self._folder / f"items.{split.value}.f32"

    def _width(self, split: Split) -> int:
        return 4 * sum(count for _, count in self._layouts[split])

    def _stream(self, split: Split) -> BinaryIO:
        if split not in self._streams:
            self._streams[split] = self._path(split).open("ab")
            fsync_folder(self._folder)
        return self._streams[split]
