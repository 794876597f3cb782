"""Where numba caches compiled kernels if it can write neither next to their sources nor to the user's cache."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import evomerge.weights.kernel_cache

PROGRAM = """
from numba.core import caching
for locator in (caching.InTreeCacheLocator, caching.UserWideCacheLocator):
    locator.from_function = classmethod(lambda *arguments: None)
import numba
import evomerge.weights.kernel_cache
from evomerge.weights import noise
print(numba.config.CACHE_DIR)
"""


def place(temporary: Path) -> Path:
    """The cache folder chosen by a new process, which can import the compiled kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return Path(done.stdout.strip())


def test_private_folder_is_used_and_kept(tmp_path: Path) -> None:
    chosen = place(tmp_path)
    assert chosen == tmp_path / f"evomerge-kernels-{os.getuid()}"
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700
    assert place(tmp_path) == chosen


def test_folder_writable_by_others_is_not_used(tmp_path: Path) -> None:
    """Files in the folder are loaded as code."""
    known = tmp_path / f"evomerge-kernels-{os.getuid()}"
    known.mkdir()
    known.chmod(0o777)
    chosen = place(tmp_path)
    assert chosen != known
    assert not chosen.exists(), "it is removed at exit"
    shutil.rmtree(known)
    known.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    assert place(tmp_path) != known
    known.unlink()
    known.write_text("somebody else's")
    assert place(tmp_path) != known


def test_numba_chooses_the_cache_folder_if_it_can_write_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    evomerge.weights.kernel_cache._set_place()
    assert "NUMBA_CACHE_DIR" not in os.environ
