"""Where numba keeps compiled kernels. It takes a folder beside their sources or the user's cache, and refuses to begin where it can write to neither.

So it is in containers, and where an administrator has installed the package. Importing this, before anything that numba compiles, sets the place.
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
    """Has numba, in this process and those it starts, keep kernels in a folder for temporary files where it has no other place."""
    try:
        numba.njit(cache=True)(_any_function)
    except RuntimeError:
        os.environ["NUMBA_CACHE_DIR"] = str(_own_folder())
        numba.core.config.reload_config()


def _any_function() -> None:
    """What numba is asked to keep: in this package, as the kernels are."""


def _own_folder() -> Path:
    """A folder that nobody else can write to, the same each time if possible: what is kept there is loaded as code."""
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
