"""The hidden folder beside a new model in which it is made, and what killed merges left of theirs.

`flock` on the folder says that its merge lives; the kernel ends it with the process, however that ends. Its name says on which machine, since
a shared file system may not pass a lock on to others.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evomerge.core import CheckpointError, fsync_folder, machine_id

logger = logging.getLogger(__name__)


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which is removed in the end if it is still there.

    Raises:
        CheckpointError: it cannot be made, or the disk fails while it is used.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging, lock = _locked_folder(out)
    except OSError as problem:
        raise CheckpointError(f"{out.parent}: cannot be written: {problem.strerror}") from None
    try:
        yield staging
    except OSError as problem:
        raise CheckpointError(f"{out}: cannot be written: {problem.strerror or problem}; nothing was kept") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _settle(out)
        os.close(lock)


def remove_leftovers(out: Path) -> None:
    """Removes the hidden folders of killed merges to `out`; what is locked, or of another machine, stays.

    A model that one of them had moved aside, and put nothing in the place of, is put back.
    """
    for folder, machine in _beside(out, ".merging"):
        if machine != _here():
            logger.warning(
                "%s: left by a merge on another machine, or before a restart; delete it unless that merge still runs",
                folder,
            )
            continue
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("%s: left by a merge that was killed, removed", folder)
        except OSError:  # locked: its merge lives
            continue
        finally:
            os.close(lock)
    _settle(out)


def put_in_place(staging: Path, out: Path) -> None:
    """Renames `staging` to `out`; a folder in its place is moved aside first and deleted last."""
    aside = staging.with_suffix(".replaced")
    if out.is_dir():
        os.replace(out, aside)
    os.replace(staging, out)
    fsync_folder(out.parent)
    # at once: while another merge is between its renames, `_settle` would put this back and be in its way
    shutil.rmtree(aside, ignore_errors=True)


def _settle(out: Path) -> None:
    """Deletes what merges to `out` moved aside; puts it back where nothing has taken its place."""
    for aside, _ in _beside(out, ".replaced"):
        if aside.with_suffix(".merging").exists():  # its merge is about to put that in place
            continue
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            continue
        with suppress(OSError):  # another merge has come first
            os.replace(aside, out)
            logger.warning("%s: put back as it was before a merge that did not finish", out)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        staging = out.parent / f".{out.name}.{_here()}-{secrets.token_hex(4)}.merging"
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another merge took it for a leftover before it was locked
            os.close(lock)
            continue
        except OSError:  # a file system without locks, where nobody can take it for one
            return staging, lock
        if staging.exists():
            return staging, lock
        os.close(lock)


def _beside(out: Path, suffix: str) -> list[tuple[Path, str]]:
    """Hidden folders of merges to `out`, and the machines that made them."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(?P<machine>[^.-]*)-?[^.]*{re.escape(suffix)}")
    try:
        found = [(path, pattern.fullmatch(path.name)) for path in out.parent.iterdir()]
    except OSError:  # not there yet, or not to be listed
        return []
    return [(path, match["machine"]) for path, match in found if match is not None]


def _here() -> str:
    return hashlib.sha256(machine_id().encode()).hexdigest()[:8]
