"""The lock that keeps a second process out of a run directory, on this machine and on all others that share the directory.

On one machine the kernel decides (`flock`), so a lock ends with its process, however it ends. If the lock file names another machine, whose
`flock` may not be visible through a shared file system, or if the file system has no `flock`, the holder's heartbeat decides: a counter in the
file that must keep increasing. Clocks are never compared, so they may differ or go backwards.
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
"""how often the holder increases its counter"""

PATIENCE = 4
"""A holder on another machine counts as dead if its counter has not changed for this many heartbeats."""


class RunLock:
    """Holds a run directory for one process, as a context manager.

    Args:
        folder: the run directory.
        heartbeat_s: interval between heartbeats.
        machine: identifies this machine; default: its kernel's boot id, which containers on it share.

    Raises:
        JournalError: on entering, if another process holds the run (the message names its host and pid), or the lock file cannot be written.
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
        self._is_lost = False

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
        """Check that no other process has taken over the run, as far as the heartbeat has seen, or after a suspension by looking again.

        Raises:
            JournalError: another process has; this one must not write any more.
        """
        if self._is_lost or _awake_and_asleep_s() - self._seen_s > self._heartbeat_s * PATIENCE / 2:
            self._confirm()

    def _take(self, stream: BinaryIO) -> None:
        locked = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(_read(self._path)) from None
        except OSError as problem:
            logger.warning("%s: this file system has no flock (%s); relying on heartbeats alone", self._path, problem)
            locked = False
        holder = _read(self._path)
        if holder and not (locked and holder.get("machine") == self._machine):
            self._wait_for_heartbeat(holder)
            self._write(0)
            time.sleep(self._heartbeat_s / 2)  # another process that waited too may write its name over ours
            if not self._is_ours():
                raise self._in_use(_read(self._path))
        else:
            self._write(0)

    def _wait_for_heartbeat(self, holder: Mapping[str, Any]) -> None:
        """Watch the counter of a holder that flock does not show; return if it does not change.

        Raises:
            JournalError: it changes, so the holder is alive.
        """
        logger.warning(
            "%s is held by %s; waiting %g s for a heartbeat",
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
        logger.warning("%s: no heartbeat; taking over the run", self._path)

    def _in_use(self, holder: Mapping[str, Any]) -> JournalError:
        return JournalError(
            f"{self._path.parent}: this run is in use by {_who(holder)}; wait until it ends, or stop it"
        )

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._heartbeat_s):
            count += 1
            try:
                self._confirm()
                self._write(count)
            except JournalError:
                self._is_lost = True
                return
            except OSError as problem:
                logger.warning("%s: cannot write the heartbeat (%s)", self._path, problem.strerror)

    def _confirm(self) -> None:
        if not self._is_ours():
            raise JournalError(
                f"{self._path.parent}: another process has taken over this run, because this one showed no heartbeat for "
                f"{PATIENCE * self._heartbeat_s:g} s. This process stops; the other continues from what was saved"
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
            "heartbeat": f"{count:012d}",  # constant length, so that a reader never sees a mixture of two contents
        }
        # not through the stream of the lock: it is opened for appending, and pwrite would append too
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            size = os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
        self._seen_s = _awake_and_asleep_s()


class HolderWatch:
    """Tells, without taking the lock, which process works on the run in `folder`, and whether it is alive.

    A process in this machine's process list is looked up there by pid and start time, so that another process with a reused pid is not mistaken
    for it. For any other, on another machine or in another container, the heartbeat decides.
    """

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._path = folder / "lock"
        self._silence_s = PATIENCE * heartbeat_s
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._moved_s = 0.0

    def look(self) -> tuple[str, bool | None] | None:
        """The current holder and whether it is alive (None: not yet known); None if nobody holds the run."""
        content = _read(self._path)
        if not content:
            return None
        now = _awake_and_asleep_s()
        if not self._first or content.get("token") != self._first.get("token"):
            self._first, self._last, self._moved_s = content, content, now
        elif content != self._last:
            self._last, self._moved_s = content, now
        return _who(content), self._is_alive(content, now)

    def _is_alive(self, content: Mapping[str, Any], now: float) -> bool | None:
        pid, mark = content.get("pid"), content.get("process")
        if content.get("machine") == machine_id() and isinstance(pid, int) and isinstance(mark, str):
            namespace = mark.partition(":")[0]
            if namespace == _process_mark(os.getpid()).partition(":")[0]:
                return _process_mark(pid) == mark
        if now - self._moved_s > self._silence_s:
            return False
        return True if content != self._first else None


def _process_mark(pid: int) -> str:
    """This machine's pid namespace and the start time of a process, which distinguish it from a later one with the same pid; empty if it has ended.

    A process that has ended stays in the list as a zombie until its parent reaps it, which the first process of a container may never do.
    """
    try:
        # the program's name, in brackets, may contain anything; after it come the state and, as 20th, the start time (proc_pid_stat(5), fields 3, 22)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{os.readlink('/proc/self/ns/pid')[5:-1]}:{fields[19]}"
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    """The content of the lock file; empty if nobody holds it."""
    try:
        value = json.loads(path.read_bytes() or b"{}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return _UNREADABLE  # it may just be being written
    return value if isinstance(value, dict) else _UNREADABLE


_UNREADABLE = {"content": "unreadable"}


def _who(holder: Mapping[str, Any]) -> str:
    """A description of the holder for messages."""
    return f"process {holder['pid']} on {holder.get('host')}" if "pid" in holder else "an unknown process"


def _awake_and_asleep_s() -> float:
    """A monotonic clock that includes the time that the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
