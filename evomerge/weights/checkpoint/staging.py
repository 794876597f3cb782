"""The hidden folder in which a new model is written next to its destination, and the removal of those left by killed merges.

A `flock` on the folder shows that its merge is running; the kernel releases it when the process ends, in whatever way. The folder's name
contains the machine, because a shared file system may not propagate locks to other machines.
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
    """A hidden folder next to `out`, which is removed at the end if it still exists.

    Raises:
        CheckpointError: it cannot be created, or the disk fails while it is used.
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
    """Remove the hidden folders of killed merges to `out`, except those that are locked or belong to another machine.

    If one of them moved a model aside without replacing it, that model is restored.
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
        except OSError:  # it belongs to another user, or no longer exists
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("%s: removed, left by a merge that was killed", folder)
        except OSError:  # locked: its merge is still running
            continue
        finally:
            os.close(lock)
    _settle(out)


def put_in_place(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`; a folder in its place is moved aside first and deleted last."""
    aside = staging.with_suffix(".replaced")
    if out.is_dir():
        os.replace(out, aside)
    os.replace(staging, out)
    fsync_folder(out.parent)
    # immediately: while another merge is between its renames, `_settle` would move this back and get in its way
    shutil.rmtree(aside, ignore_errors=True)


def _settle(out: Path) -> None:
    """Delete models that merges to `out` moved aside, or restore them if nothing has taken their place."""
    for aside, _ in _beside(out, ".replaced"):
        if aside.with_suffix(".merging").exists():  # its merge is about to move its result into place
            continue
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            continue
        with suppress(OSError):  # another merge may have been faster
            os.replace(aside, out)
            logger.warning("%s: restored to its state before a merge that did not finish", out)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        staging = out.parent / f".{out.name}.{_here()}-{secrets.token_hex(4)}.merging"
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another merge mistook it for a leftover before it was locked
            os.close(lock)
            continue
        except OSError:  # a file system without locks, where no merge can mistake it for a leftover
            return staging, lock
        if staging.exists():
            return staging, lock
        os.close(lock)


def _beside(out: Path, suffix: str) -> list[tuple[Path, str]]:
    """Hidden folders of merges to `out`, and the machines that created them."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(?P<machine>[^.-]*)-?[^.]*{re.escape(suffix)}")
    try:
        found = [(path, pattern.fullmatch(path.name)) for path in out.parent.iterdir()]
    except OSError:  # it does not exist yet, or cannot be listed
        return []
    return [(path, match["machine"]) for path, match in found if match is not None]


def _here() -> str:
    return hashlib.sha256(machine_id().encode()).hexdigest()[:8]
