"""Replaces files atomically: after a crash at any time, a file has either the old or the new content."""

import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from evomerge.core.jsonable import Json

FilePath = str | os.PathLike[str]
"""the type of paths in the public API"""


def fsync_folder(folder: Path) -> None:
    """Make renamed and new entries of `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` with a temporary file in the same folder that is written, fsynced and renamed.

    A symbolic link is kept and its target replaced; pipes and devices are written to directly. A new file gets permissions according to the umask,
    a replaced one keeps its own.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is then unchanged.
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
    """`atomic_write_bytes` for UTF-8 text; lone surrogates, from file names that are not UTF-8, are escaped."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def atomic_write_json(path: Path, value: Json | Mapping[str, object], *, sort_keys: bool = True) -> None:
    """Replace `path` with indented JSON. Sorted keys make it byte-identical for equal values; otherwise the order of keys is kept."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def why_unreadable(problem: OSError | UnicodeDecodeError) -> str:
    """The reason why a text file could not be read, to follow its path in a message."""
    if isinstance(problem, FileNotFoundError):
        return "no such file"
    if isinstance(problem, IsADirectoryError):
        return "is a folder; expected a file"
    if isinstance(problem, UnicodeDecodeError):
        return f"is not UTF-8 text (byte {problem.object[problem.start]:#04x} at position {problem.start})"
    return f"cannot be read: {problem.strerror or problem}"
