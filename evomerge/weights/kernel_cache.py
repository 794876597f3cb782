"""The folder of numba's compiled kernels. By default, numba uses a folder next to their sources or the user's cache, and fails if it can write to neither.

This happens in containers, and if an administrator has installed the package. Import this module before anything that numba compiles.
"""

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import numba


def _set_place() -> None:
    """Make numba, in this process and its child processes, cache kernels in a temporary folder if there is no other place."""
    try:
        numba.njit(cache=True)(_any_function)
    except RuntimeError:
        os.environ["NUMBA_CACHE_DIR"] = str(_own_folder())
        numba.core.config.reload_config()


def _any_function() -> None:
    """A function for testing numba's cache; it is in this package, like the kernels."""


def _own_folder() -> Path:
    """A folder to which no other user can write, because its contents are loaded as code; the same one each time if possible."""
    folder = Path(tempfile.gettempdir()) / f"evomerge-kernels-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    other = Path(tempfile.mkdtemp(prefix="evomerge-kernels-"))
    atexit.register(shutil.rmtree, other, ignore_errors=True)
    return other


_set_place()
