"""What a local Ray session leaves behind goes with it, or, where its driver was killed, with the start of the next."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.cluster.session_folder import SessionFolder

KILLED = """
import os, signal
from pathlib import Path
from evomerge.cluster.session_folder import SessionFolder
SessionFolder().adopt(Path("ray/session_1").absolute())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def _ray_session(temporary: Path, name: str) -> Path:
    session = temporary / "ray" / name
    (session / "logs").mkdir(parents=True)
    latest = temporary / "ray" / "session_latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(session)
    return session


def test_nothing_is_left_of_a_session_that_has_ended(temporary: Path) -> None:
    folder = SessionFolder()
    folder.adopt(_ray_session(temporary, "session_1"))
    (folder.path / "vllm_dist").touch()
    assert (folder.path.stat().st_mode & 0o777) == 0o700
    folder.close()
    assert [path.name for path in temporary.rglob("*")] == ["ray"]


@pytest.mark.parametrize("n_writes", [1, math.inf])
def test_a_process_that_still_writes_is_waited_for_a_while(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, n_writes: float
) -> None:
    monkeypatch.setattr("evomerge.cluster.session_folder._PATIENCE_S", 5.0 if n_writes == 1 else 0.1)
    folder = SessionFolder()
    session = _ray_session(temporary, "session_1")
    folder.adopt(session)
    remove, written = shutil.rmtree, []

    def remove_and_write(path: Path, *, ignore_errors: bool) -> None:
        remove(path, ignore_errors=ignore_errors)
        if path == session and len(written) < n_writes:
            written.append(path)
            path.mkdir()

    monkeypatch.setattr("shutil.rmtree", remove_and_write)
    folder.close()
    assert written
    assert session.exists() == (n_writes > 1)
    assert not folder.path.exists()


def test_a_session_of_another_program_stays(temporary: Path) -> None:
    folder = SessionFolder()
    folder.adopt(_ray_session(temporary, "session_1"))
    other = _ray_session(temporary, "session_2")
    folder.close()
    assert sorted(path.name for path in (temporary / "ray").iterdir()) == ["session_2", "session_latest"]
    assert (temporary / "ray" / "session_latest").readlink() == other


def test_ray_s_logs_stay_where_a_reason_may_be_in_them(temporary: Path) -> None:
    folder = SessionFolder()
    session = _ray_session(temporary, "session_1")
    folder.adopt(session)
    folder.close(keep_session=True)
    SessionFolder().close()
    assert session.exists()
    assert not folder.path.exists()


def test_the_next_session_removes_what_a_killed_driver_has_left(temporary: Path) -> None:
    alive = SessionFolder()
    stranger = temporary / "evomerge-ray-stranger"
    stranger.mkdir()
    session = _ray_session(temporary, "session_1")
    subprocess.run(
        [sys.executable, "-c", KILLED], cwd=temporary, env={**os.environ, "TMPDIR": str(temporary)}, check=False
    )
    assert len(list(temporary.glob("evomerge-ray-*"))) == 3
    following = SessionFolder()
    assert set(temporary.glob("evomerge-ray-*")) == {alive.path, stranger, following.path}
    assert not session.exists()
    alive.close()
    following.close()


def test_what_somebody_else_has_put_there_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder for temporary files is everybody's: a session may not remove what a link of another user names, or another user's own."""
    session = _ray_session(temporary, "session_1")
    left = temporary / "left"
    left.mkdir()
    (left / "lock").touch()
    (left / "session").symlink_to(session)
    (temporary / "evomerge-ray-link").symlink_to(left)
    SessionFolder().close()
    assert session.exists()
    (temporary / "evomerge-ray-link").unlink()
    theirs = left.rename(temporary / "evomerge-ray-theirs")
    monkeypatch.setattr("os.geteuid", lambda: theirs.stat().st_uid + 1)
    SessionFolder().close()
    assert session.exists()
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    SessionFolder().close()
    assert not session.exists()
