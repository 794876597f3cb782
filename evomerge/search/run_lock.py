"""The lock that keeps a second process out of a run directory, on this machine and on every other that sees the directory.

On one machine the kernel decides (`flock`), so a lock ends with its process, however it ends. Where the file names another machine, whose
`flock` a shared file system may not pass on, or the file system has no `flock`, the holder's heartbeat decides: a counter in the file that
is seen to move or not to move. No clock is compared, so clocks may differ or go backwards.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from evomerge.core import JournalError, machine_id

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""How often the holder raises its counter."""

PATIENCE = 4
"""A holder on another machine whose counter stands still for so many heartbeats is gone."""


class RunLock:
    """Holds a run directory for one process.

    Args:
        folder: the run directory.
        heartbeat_s: how often the holder says that it lives.
        machine: identifies this machine; default: its kernel's boot id, which containers on it share.

    Raises:
        JournalError: another process has the run (the message names its host and pid), or the lock file cannot be written.
    """

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S, machine: str | None = None) -> None:
        self._path = folder / "lock"
        self._heartbeat_s = heartbeat_s
        self._machine = machine or machine_id()
        self._token = secrets.token_hex(8)
        self._stream: BinaryIO | None = None
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None
        self._seen_s = 0.0

    def __enter__(self) -> "RunLock":
        try:
            stream = self._path.open("a+b", buffering=0)
            try:
                self._take(stream)
            except BaseException:
                stream.close()
                raise
        except OSError as problem:
            raise JournalError(
                f"{self._path.parent}: cannot be written to ({problem.strerror}); free space, or make it writable for this user"
            ) from None
        self._stream = stream
        self._beating = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        if self._stream is not None:
            if self._is_ours():
                os.ftruncate(self._stream.fileno(), 0)
            self._stream.close()
            self._stream = None

    def check(self) -> None:
        """Makes sure, where this process has been asleep for long, that nobody has taken the run over meanwhile.

        Raises:
            JournalError: somebody has; this process must not write any more.
        """
        if _awake_and_asleep_s() - self._seen_s > self._heartbeat_s * PATIENCE / 2:
            self._confirm()

    def _take(self, stream: BinaryIO) -> None:
        locked = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(_read(self._path)) from None
        except OSError as problem:
            logger.warning("%s: this file system has no flock (%s); the heartbeat alone decides", self._path, problem)
            locked = False
        holder = _read(self._path)
        if holder and not (locked and holder.get("machine") == self._machine):
            self._wait_for_a_sign(holder)
        self._write(0)

    def _wait_for_a_sign(self, holder: Mapping[str, Any]) -> None:
        """Watches the counter of a holder that flock says nothing of; returns when it does not move."""
        logger.warning(
            "%s is held by %s; waiting %g s for a sign that it is alive",
            *(self._path, _who(holder), PATIENCE * self._heartbeat_s),
        )
        deadline = time.monotonic() + PATIENCE * self._heartbeat_s
        while time.monotonic() < deadline:
            time.sleep(self._heartbeat_s / 4)
            now = _read(self._path)
            if not now:
                return
            if now != holder:
                raise self._in_use(now)
        logger.warning("%s: no sign of life; the run is taken over", self._path)

    def _in_use(self, holder: Mapping[str, Any]) -> JournalError:
        return JournalError(
            f"{self._path.parent}: this run is in use by {_who(holder)}; wait for it to end, or stop it"
        )

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._heartbeat_s):
            count += 1
            try:
                self._confirm()
                self._write(count)
            except JournalError:
                return  # `check` says so where somebody wants to write
            except OSError as problem:
                logger.warning("%s: no heartbeat (%s)", self._path, problem.strerror)

    def _confirm(self) -> None:
        if not self._is_ours():
            raise JournalError(
                f"{self._path.parent}: another process has taken this run over, because this one gave no sign of life for "
                f"{PATIENCE * self._heartbeat_s:g} s; it stops here, what was saved before is the other's now"
            )
        self._seen_s = _awake_and_asleep_s()

    def _is_ours(self) -> bool:
        return _read(self._path).get("token") == self._token

    def _write(self, count: int) -> None:
        content = {
            "pid": os.getpid(),
            "process": _process_mark(os.getpid()),
            "host": socket.gethostname(),
            "machine": self._machine,
            "token": self._token,
            "heartbeat": f"{count:012d}",  # of constant length, so that a reader never sees half of two
        }
        # not through the stream of the lock: it was opened for appending, where pwrite would append as well
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            size = os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
        self._seen_s = _awake_and_asleep_s()


class HolderWatch:
    """Tells from outside, without taking the lock, who works on the run in `folder`, and whether that process lives.

    A process that is seen in this machine's list of processes is looked for there, by number and start time, so that a number which has been
    given to another process is not taken for it. Of any other, on another machine or in another container, the heartbeat tells.
    """

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._path = folder / "lock"
        self._silence_s = PATIENCE * heartbeat_s
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._moved_s = 0.0

    def look(self) -> tuple[str, bool | None] | None:
        """The holder now, and whether it lives (None: it has not been watched long enough to say); None where nobody holds the run."""
        content = _read(self._path)
        if not content:
            return None
        now = _awake_and_asleep_s()
        if not self._first or content.get("token") != self._first.get("token"):
            self._first, self._last, self._moved_s = content, content, now
        elif content != self._last:
            self._last, self._moved_s = content, now
        return _who(content), self._lives(content, now)

    def _lives(self, content: Mapping[str, Any], now: float) -> bool | None:
        pid, mark = content.get("pid"), content.get("process")
        if content.get("machine") == machine_id() and isinstance(pid, int) and isinstance(mark, str):
            namespace = mark.partition(":")[0]
            if namespace == _process_mark(os.getpid()).partition(":")[0]:
                return _process_mark(pid) == mark
        if now - self._moved_s > self._silence_s:
            return False
        return True if content != self._first else None


def _process_mark(pid: int) -> str:
    """A process's list of processes and its start time, which tell it from a later one of the same number; empty where it has ended.

    One that has ended stays in the list while its parent does not ask how, as where a container's first process never does.
    """
    try:
        # the name of the program, in brackets, may hold anything; after it come the state and, 20th, the start time (proc_pid_stat(5), fields 3 and 22)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{os.readlink('/proc/self/ns/pid')[5:-1]}:{fields[19]}"
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    """What the lock file says; empty where nobody holds it."""
    try:
        value = json.loads(path.read_bytes() or b"{}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return _UNREADABLE  # perhaps it is being written
    return value if isinstance(value, dict) else _UNREADABLE


_UNREADABLE = {"content": "unreadable"}


def _who(holder: Mapping[str, Any]) -> str:
    """The holder as messages name it."""
    return f"process {holder['pid']} on {holder.get('host')}" if "pid" in holder else "an unknown process"


def _awake_and_asleep_s() -> float:
    """A clock that never goes back and that counts the time a machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
