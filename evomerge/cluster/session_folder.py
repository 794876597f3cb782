"""Where a local Ray session and its workers keep files for as long as it lasts, and what Ray leaves of it: 250 kB and more for each session.

All of it goes when the session ends; what a driver that was killed has left goes when the next session of this user starts.
"""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_PREFIX = "evomerge-ray-"
_LOCK = "lock"
"""The file that a session's driver holds for as long as it lives."""
_SESSION = "session"
"""A link to Ray's own folder of the session."""
_LATEST = "session_latest"
"""Ray's link, beside its sessions."""
_PATIENCE_S = 5.0
"""Processes that end still write their logs."""


class SessionFolder:
    """A temporary folder of this process, for this user only."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock: BinaryIO = (self.path / f"{_LOCK}.new").open("wb")
        with suppress(OSError):  # without flock nobody can tell later whether the session lives, so it is not swept
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / f"{_LOCK}.new").rename(self.path / _LOCK)  # not before it is held
        for other in self.path.parent.glob(f"{_PREFIX}*"):
            if _is_left_over(other):
                _remove(other)

    def adopt(self, session: Path) -> None:
        """Takes Ray's folder of the session over, to be removed with this one."""
        (self.path / _SESSION).symlink_to(session)

    def close(self, *, keep_session: bool = False) -> None:
        """Removes the folder after the session has ended, and Ray's where nobody will look for a reason in it (`keep_session`)."""
        if keep_session:
            (self.path / _SESSION).unlink(missing_ok=True)
        _remove(self.path)
        self._lock.close()


def _is_left_over(folder: Path) -> bool:
    """Whether `folder` is this user's and the driver that has made it is gone."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return False
        with (folder / _LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(folder: Path) -> None:
    with suppress(OSError):
        session = (folder / _SESSION).readlink()
        _remove_tree(session)
        if (session.parent / _LATEST).readlink() == session:
            (session.parent / _LATEST).unlink()
    _remove_tree(folder)


def _remove_tree(folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)
