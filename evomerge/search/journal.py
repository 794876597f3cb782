"""The journal: an append-only file of checksummed events, fsynced before anything acts on them.

A line is `<crc32 of the JSON, 8 hex digits> <JSON object>` and a newline; the object's `seq` counts from 0. The events and their
order are described in docs/journal.md. Knows nothing of what the events mean.
"""

import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from evomerge.core import JournalError, Json, canonical_json, fsync_folder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when an event changes its meaning; a journal from a newer version is refused."""

MAX_RECORD_BYTES = 64 << 20
"""A record holds one candidate; this is far above a 20,000-coordinate genome (0.5 MB)."""


class Journal:
    """An open journal file.

    Opening cuts off a torn last record (a crash while writing) and refuses any other damage.

    Args:
        path: the file; created if absent.

    Raises:
        JournalError: a damaged, repeated or missing record before the last one, or a record of a newer version.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        existed = path.exists()
        self._events, good_bytes = _read(path) if existed else ([], 0)
        self._stream: BinaryIO = path.open("ab")
        if existed and path.stat().st_size > good_bytes:
            logger.warning("%s: cut off a torn last record (%d bytes)", path, path.stat().st_size - good_bytes)
            self._stream.truncate(good_bytes)
            os.fsync(self._stream.fileno())
        if not existed:
            fsync_folder(path.parent)
        self._next = len(self._events)

    def replay(self) -> Iterator[Mapping[str, Any]]:
        """The events that were in the file when it was opened, in order."""
        return iter(self._events)

    def append(self, *events: Mapping[str, Json]) -> None:
        """Writes `events` and returns when they are durable: all or, after a crash, a prefix of them.

        Raises:
            JournalError: the disk is full or the file is no longer writable; nothing half-written stays behind.
        """
        records = [canonical_json({**event, "seq": self._next + index}).encode() for index, event in enumerate(events)]
        content = b"".join(b"%08x %s\n" % (zlib.crc32(record), record) for record in records)
        size = self._stream.tell()
        try:
            self._stream.write(content)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as problem:
            self._undo(size)
            raise JournalError(
                f"{self._path}: cannot be written ({problem.strerror}); nothing finished is lost. Free space and resume the run"
            ) from problem
        self._next += len(events)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def _undo(self, size: int) -> None:
        try:
            os.ftruncate(self._stream.fileno(), size)
        except OSError:
            logger.exception(
                "%s: the half-written record could not be removed; it is cut off on the next opening", self._path
            )


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The events of a journal that may still be written to by another process; a torn last record is left out.

    Raises:
        JournalError: as `Journal`.
    """
    if not path.is_file():
        raise JournalError(f"{path}: no journal there; is {path.parent} a run directory?")
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All good events and the number of bytes they take."""
    content = path.read_bytes()
    events: list[dict[str, Any]] = []
    position = 0
    while position < len(content):
        end = content.find(b"\n", position)
        line = content[position:] if end < 0 else content[position:end]
        event = _parse(line) if end >= 0 else None
        if event is None:
            if end < 0 or end == len(content) - 1:
                return events, position
            raise JournalError(
                f"{path}: record {len(events)} (byte {position}) is damaged; the {len(events)} records before it are good. {_advice(path)}"
            )
        if event.get("seq") != len(events):
            raise JournalError(
                f"{path}: record {len(events)} (byte {position}) has number {event.get('seq')}: lines are missing, repeated or moved. {_advice(path)}"
            )
        if event.get("event") == "run" and event.get("version") != FORMAT_VERSION:
            raise JournalError(
                f"{path}: written in journal format {event.get('version')}, this evomerge reads {FORMAT_VERSION}; use the version that wrote it"
            )
        events.append(event)
        position = end + 1
    return events, position


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, space, record = line.partition(b" ")
    if not space or len(checksum) != 8 or len(record) > MAX_RECORD_BYTES or b"%08x" % zlib.crc32(record) != checksum:
        return None
    value = json.loads(record)  # the checksum vouches for it
    return value if isinstance(value, dict) else None


def _advice(path: Path) -> str:
    return f"To go on from the good part, copy the run directory and cut {path.name} there"


def event(kind: str, **fields: Json) -> dict[str, Json]:
    """An event record: its kind under `event`, and its fields."""
    return {"event": kind, **fields}


def events_of(kind: str, events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of one kind, in order."""
    return [record for record in events if record["event"] == kind]
