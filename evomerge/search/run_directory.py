"""A run directory: its files, and the lock that keeps a second process out of it."""

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from evomerge.core import JournalError


class RunDirectory:
    """Paths of the files of one run; see docs/run-directory.md for what each holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.resolved = folder / "resolved.json"
        self.journal = folder / "journal.jsonl"
        self.front_json = folder / "front.json"
        self.front_csv = folder / "front.csv"
        self.best = folder / "best.yaml"
        self.summary = folder / "summary.json"
        self.logs = folder / "logs"

    @property
    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.journal.exists() or self.resolved.exists()

    def read_resolved(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            JournalError: this is not a run directory.
        """
        try:
            value = json.loads(self.resolved.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise JournalError(f"{self.folder}: not a run directory (no {self.resolved.name} in it)") from None
        except ValueError as problem:
            raise JournalError(f"{self.resolved}: not readable: {problem}") from None
        if not isinstance(value, dict):
            raise JournalError(f"{self.resolved}: expected a mapping")
        return value


class RunLock:
    """Holds a run directory for one process; the kernel releases it when the process ends, however it ends.

    Raises:
        JournalError: another process has the run; the message names its host and pid.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._stream: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        stream = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise JournalError(
                f"{self._path.parent}: this run is in use by {holder}; wait for it to end, or stop it"
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        self._stream = stream
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.truncate(0)
            self._stream.close()
