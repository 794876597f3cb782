"""Where numba keeps compiled kernels when it can write neither beside their sources nor into the user's cache."""

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
    """The folder that a process chooses, which could import what is compiled."""
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


def test_a_private_folder_is_taken_and_kept(tmp_path: Path) -> None:
    chosen = place(tmp_path)
    assert chosen == tmp_path / f"evomerge-kernels-{os.getuid()}"
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700
    assert place(tmp_path) == chosen


def test_a_folder_that_others_can_write_to_is_not(tmp_path: Path) -> None:
    """What lies there is loaded as code."""
    known = tmp_path / f"evomerge-kernels-{os.getuid()}"
    known.mkdir()
    known.chmod(0o777)
    chosen = place(tmp_path)
    assert chosen != known
    assert not chosen.exists(), "it is removed in the end"
    shutil.rmtree(known)
    known.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    assert place(tmp_path) != known
    known.unlink()
    known.write_text("somebody else's")
    assert place(tmp_path) != known


def test_elsewhere_numba_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    evomerge.weights.kernel_cache._set_place()
    assert "NUMBA_CACHE_DIR" not in os.environ
