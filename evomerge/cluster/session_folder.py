"""The temporary files of a local Ray session and its workers, including what Ray leaves behind (250 kB or more per session).

They are deleted when the session ends; those of a driver that was killed are deleted when this user's next session starts.
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
"""a file that the session's driver keeps locked as long as it runs"""
_SESSION = "session"
"""a link to Ray's own folder of the session"""
_LATEST = "session_latest"
"""Ray's link to its latest session, in the folder of its sessions"""
_PATIENCE_S = 5.0
"""how long to retry deleting, since ending processes still write their logs"""


class SessionFolder:
    """A temporary folder of this process, for this user only."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock: BinaryIO = (self.path / f"{_LOCK}.new").open("wb")
        with suppress(
            OSError
        ):  # without flock it cannot be known later whether the session is alive, so it is not cleaned up
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / f"{_LOCK}.new").rename(self.path / _LOCK)  # only once it is locked
        for other in self.path.parent.glob(f"{_PREFIX}*"):
            if _is_left_over(other):
                _remove(other)

    def adopt(self, session: Path) -> None:
        """Mark Ray's folder of the session to be removed with this one."""
        (self.path / _SESSION).symlink_to(session)

    def close(self, *, keep_session: bool = False) -> None:
        """Remove the folder after the session has ended, and Ray's folder too unless its logs may explain a failure (`keep_session`)."""
        if keep_session:
            (self.path / _SESSION).unlink(missing_ok=True)
        _remove(self.path)
        self._lock.close()


def _is_left_over(folder: Path) -> bool:
    """Whether `folder` belongs to this user and the driver that made it is gone."""
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
