"""Replacing files so that a crash at any instant leaves either the old content or the new one."""

import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from evomerge.core.jsonable import Json

FilePath = str | os.PathLike[str]
"""what the public API takes as a path"""


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`: written beside it, fsynced, renamed. A link keeps pointing where it does; pipes and devices are written to.

    A new file's permissions are those that the umask leaves, a replaced one's stay.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is then untouched.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            if path.exists():
                os.fchmod(stream.fileno(), stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text; bytes of file names that are no text stand escaped."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def atomic_write_json(path: Path, value: Json | Mapping[str, object], *, sort_keys: bool = True) -> None:
    """Replaces `path` by indented JSON; with sorted keys it is byte-identical for equal values, without them it keeps their order."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def why_unreadable(problem: OSError | UnicodeDecodeError) -> str:
    """In words, why a text file could not be read."""
    if isinstance(problem, FileNotFoundError):
        return "there is no such file"
    if isinstance(problem, IsADirectoryError):
        return "is a folder; name a file"
    if isinstance(problem, UnicodeDecodeError):
        return f"is not text in UTF-8 (byte {problem.object[problem.start]:#04x} at position {problem.start})"
    return f"cannot be read: {problem.strerror or problem}"
