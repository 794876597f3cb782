"""The journal: an append-only file of checksummed events, fsynced before anything outside the process acts on them.

A line is `<crc32 of the JSON, 8 hex digits> <JSON object>` and a newline; the object's `seq` counts from 0. The events and their
order are described in docs/journal.md. This module does not interpret events, and keeps none of them in memory.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from evomerge.core import JournalError, Json, canonical_json, fsync_folder, why_unreadable

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""increased when the meaning of an event changes; journals with another version are refused"""

MAX_RECORD_BYTES = 64 << 20
"""A record holds one candidate; this is far more than a genome of 20,000 coordinates needs (0.5 MB)."""


class Journal:
    """An open journal file.

    Opening it cuts off a torn last record (from a crash while writing) and refuses any other damage.

    Args:
        path: the file; created if missing.
        take: called with each event in the file, in order.

    Raises:
        JournalError: a record before the last one is damaged, repeated or missing, or the journal has another format version.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, take: Callable[[Mapping[str, Any]], None] = lambda event: None) -> None:
        self._path = path
        self._n_durable = self._n_bytes = 0
        existed = path.exists()
        for record, end in _records(path) if existed else ():
            take(record)
            self._n_durable, self._n_bytes = self._n_durable + 1, end
        self._n_replayed = self._n_durable
        self._waiting: list[bytes] = []
        self._stream: BinaryIO = path.open("ab", buffering=0)
        if existed and path.stat().st_size > self._n_bytes:
            logger.warning("%s: cut off a torn last record (%d bytes)", path, path.stat().st_size - self._n_bytes)
            self._stream.truncate(self._n_bytes)
            os.fsync(self._stream.fileno())
        if not existed:
            fsync_folder(path.parent)

    def replay(self) -> Iterator[dict[str, Any]]:
        """The events that were in the file when it was opened, in order; read from the file on each call."""
        return (event for event, _ in islice(_records(self._path), self._n_replayed))

    def append(self, *events: Mapping[str, Json]) -> None:
        """Write `events` and make them durable, together with those already queued; after a crash, a prefix of them is durable.

        Raises:
            JournalError: see `write` and `commit`.
        """
        self.write(*events)
        self.commit()

    def write(self, *events: Mapping[str, Json]) -> None:
        """Queue `events`, in this order, for the next `commit`.

        Raises:
            JournalError: one of them exceeds the maximum size; none is queued.
        """
        lines = []
        for number, event in enumerate(events, self._n_durable + len(self._waiting)):
            record = canonical_json({**event, "seq": number}).encode()
            if len(record) > MAX_RECORD_BYTES:
                raise JournalError(
                    f"{self._path}: the record `{event['event']}` of {event.get('id', 'the run')} has {len(record)} bytes, more than the maximum of {MAX_RECORD_BYTES}; "
                    "it was not written, and every finished evaluation is saved"
                )
            lines.append(b"%08x %s\n" % (zlib.crc32(record), record))
        self._waiting += lines

    def commit(self) -> None:
        """Make all queued events durable, with one fsync.

        Raises:
            JournalError: the disk is full or the file is no longer writable; partial records are removed.
        """
        if not self._waiting:
            return
        content = b"".join(self._waiting)
        n_events = len(self._waiting)
        self._waiting.clear()
        try:
            write_all(self._stream, content)
            os.fsync(self._stream.fileno())
        except OSError as problem:
            self._undo()
            raise JournalError(
                f"{self._path}: cannot be written ({problem.strerror}); every finished evaluation is saved. Free space and resume the run"
            ) from problem
        self._n_durable += n_events
        self._n_bytes += len(content)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _undo(self) -> None:
        try:
            os.ftruncate(self._stream.fileno(), self._n_bytes)
        except OSError:
            logger.exception(
                "%s: a partial record could not be removed; it is cut off when the journal is next opened", self._path
            )


def journal_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a journal that another process may be writing to, read one by one.

    An incomplete last record is left out; a missing file has no events.

    Raises:
        JournalError: see `Journal`.
    """
    if path.is_file():
        yield from (record for record, _ in _records(path))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """`journal_events` as a list."""
    return list(journal_events(path))


def first_event(path: Path) -> dict[str, Any]:
    """The first event of a journal; empty if there is none yet.

    Raises:
        JournalError: see `Journal`; or the file cannot be read.
    """
    try:
        return next((record for record, _ in _records(path)), {})
    except FileNotFoundError:
        return {}
    except OSError as problem:
        raise JournalError(f"{path}: {why_unreadable(problem)}") from None


class JournalReader:
    """Follows a journal that another process writes to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = self._position = 0

    def new_events(self) -> list[dict[str, Any]]:
        """The events since the last call, without a record that is still being written; none as long as there is no file.

        Raises:
            JournalError: see `Journal`.
        """
        if not self._path.is_file():
            return []
        events = []
        for record, end in _records(self._path, self._index, self._position):
            events.append(record)
            self._index, self._position = self._index + 1, end
        return events


def write_all(stream: BinaryIO, content: bytes) -> None:
    """Write all of `content` to an unbuffered file, whose `write` may write only a part."""
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]


def _records(path: Path, index: int = 0, position: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield every event from record `index` (at byte `position`) on and the position after it, up to a torn last record."""
    limit = MAX_RECORD_BYTES + 10
    with path.open("rb") as stream:
        stream.seek(position)
        while line := stream.readline(limit):
            event = _parse(line)
            if event is None:
                # a line without newline was the last one when it was read, even if another process has continued it since
                if (len(line) < limit and not line.endswith(b"\n")) or not stream.read(1):
                    return
                raise JournalError(
                    f"{path}: record {index} (byte {position}) is damaged; the {index} records before it are intact. {_advice(path)}"
                )
            if event.get("seq") != index:
                raise JournalError(
                    f"{path}: record {index} (byte {position}) has number {event.get('seq')}: lines are missing, repeated or moved. {_advice(path)}"
                )
            if event.get("event") == "run" and event.get("version") != FORMAT_VERSION:
                raise JournalError(
                    f"{path}: has journal format {event.get('version')}, but this evomerge reads format {FORMAT_VERSION}; use the evomerge version that wrote it"
                )
            index, position = index + 1, position + len(line)
            yield event, position


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, record = line.partition(b" ")
    if not record.endswith(b"\n") or b"%08x" % zlib.crc32(record[:-1]) != checksum:
        return None
    value = json.loads(record)  # valid, since the checksum matches
    return value if isinstance(value, dict) else None


def _advice(path: Path) -> str:
    return f"To continue from the intact part, copy the run directory and truncate {path.name} at that byte in the copy"


def event(kind: str, **fields: Json) -> dict[str, Json]:
    """An event record: its kind under `event`, and its fields."""
    return {"event": kind, **fields}
