"""A killed driver leaves no process and no shared memory behind; its run can be resumed, which leaves no files behind either."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

SETTINGS = {
    "strategy": "random",
    "evaluation": {"kind": "synthetic", "function": "sphere", "delay_s": 0.05, "n_items": 10},
    "cluster": {"kind": "ray", "workers": 1},
    "budget": {"evaluations": 100_000},
    "finals": {"finalists": 0},
}


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))  # noqa: S108  (only listed, never written to)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a short path, since paths of Ray's sockets may have at most 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _start(temporary: Path, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )


def _n_results(run: Path) -> int:
    journal = run / "journal.jsonl"
    return journal.read_bytes().count(b'"event":"evaluated"') if journal.exists() else 0


def _until_a_result(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits for one more result than there is now."""
    deadline = time.monotonic() + 180
    before = _n_results(run)
    while _n_results(run) == before:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still alive after a while."""
    _, alive = psutil.wait_procs(processes, timeout=90)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.alone
def test_a_killed_driver_leaves_nothing_behind(tmp_path: Path, temporary: Path) -> None:
    config, run = tmp_path / "search.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(SETTINGS))
    before = _shared_memory()
    process = _start(temporary, "search", config, "--run-dir", run)
    _until_a_result(run, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in member.name() for member in family)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _gone(family) == []
    assert _shared_memory() - before == set()

    for send in (os.kill, os.killpg):
        process = _start(temporary, "resume", run)
        _until_a_result(run, process)
        family = psutil.Process(process.pid).children(recursive=True)
        send(process.pid, signal.SIGTERM)
        process.wait(timeout=120)
        assert process.returncode == 130, (
            "Ray's own SIGTERM handler must not replace ours, nor may we wait for a Ray that has ended too"
        )
        assert _gone(family) == []
        assert _shared_memory() - before == set()
    assert [str(path.relative_to(temporary)) for path in temporary.rglob("*")] == ["ray"], "a session left files behind"
