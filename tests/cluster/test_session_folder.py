"""Files of a local Ray session are removed when it ends or, if its driver was killed, when the next one starts."""

import math
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from evomerge.cluster.ray_session import OBJECT_STORE_BYTES, RaySession
from evomerge.cluster.session_folder import SessionFolder
from evomerge.core import ConfigError, EngineError

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


def test_nothing_is_left_of_an_ended_session(temporary: Path) -> None:
    folder = SessionFolder()
    folder.adopt(_ray_session(temporary, "session_1"))
    (folder.path / "vllm_dist").touch()
    assert (folder.path.stat().st_mode & 0o777) == 0o700
    folder.close()
    assert [path.name for path in temporary.rglob("*")] == ["ray"]


@pytest.mark.parametrize("n_writes", [1, math.inf])
def test_a_process_that_is_still_writing_is_given_some_time(
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


def test_a_session_of_another_program_is_kept(temporary: Path) -> None:
    folder = SessionFolder()
    folder.adopt(_ray_session(temporary, "session_1"))
    other = _ray_session(temporary, "session_2")
    folder.close()
    assert sorted(path.name for path in (temporary / "ray").iterdir()) == ["session_2", "session_latest"]
    assert (temporary / "ray" / "session_latest").readlink() == other


def test_rays_logs_are_kept_if_they_may_contain_the_reason(temporary: Path) -> None:
    folder = SessionFolder()
    session = _ray_session(temporary, "session_1")
    folder.adopt(session)
    folder.close(keep_session=True)
    SessionFolder().close()
    assert session.exists()
    assert not folder.path.exists()


def test_the_next_session_removes_what_a_killed_driver_left(temporary: Path) -> None:
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


def test_files_of_other_users_are_kept(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder for temporary files is shared by everybody: a session must not remove what another user's link points to, nor another user's files."""
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


def test_a_session_that_cannot_be_locked_is_not_removed_by_others(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system without `flock`, where nobody can tell whether its driver is alive."""

    def no_locks(*_: Any) -> None:
        raise OSError("no locks available")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", no_locks)
        alive = SessionFolder()
    SessionFolder().close()
    assert alive.path.exists()
    alive.close()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("problem", "stays"), [(EngineError, True), (ConfigError, False)])
def test_rays_logs_are_kept_only_after_an_engine_failure(
    monkeypatch: pytest.MonkeyPatch, problem: type[Exception], stays: bool
) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with suppress(problem), RaySession(None, 3) as session:
        assert session.folder is not None
        logs = (session.folder / "session").readlink()
        offered = session.resources()
        told = os.environ["RAY_USAGE_STATS_ENABLED"]
        raise problem
    import ray

    assert not ray.is_initialized()
    assert session.folder is None
    assert logs.exists() == stays
    shutil.rmtree(logs, ignore_errors=True)
    assert (offered["CPU"], offered["object_store_memory"]) == (3.0, OBJECT_STORE_BYTES)
    assert told == "0", "usage statistics would be sent to Ray's makers"


def test_nothing_of_ours_is_left_of_a_session_that_cannot_start(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(temporary / ("long" * 30)))  # paths of sockets may have at most 107 characters
    with pytest.raises(EngineError, match=r"cannot start Ray on this machine: .*AF_UNIX"):
        RaySession(None, 1).__enter__()
    assert list(temporary.glob("evomerge*")) == []


def test_a_ray_whose_startup_is_not_completed_is_shut_down(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[Path] = []

    def full(_: SessionFolder, session: Path) -> None:
        logs.append(session)
        raise OSError("no space left")

    monkeypatch.setattr(SessionFolder, "adopt", full)
    with pytest.raises(EngineError, match="cannot start Ray on this machine: no space left"):
        RaySession(None, 1).__enter__()
    import ray

    assert not ray.is_initialized()
    assert list(temporary.iterdir()) == []
    assert logs[0].exists(), "the logs may contain the reason"
    shutil.rmtree(logs[0])
