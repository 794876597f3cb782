"""Who may work on a run: on one machine the kernel decides, across machines the heartbeat."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evomerge.core import JournalError, machine_id
from evomerge.search import HolderWatch, RunLock

BEAT_S = 0.05


def lock(folder: Path, machine: str = "here") -> RunLock:
    return RunLock(folder, heartbeat_s=BEAT_S, machine=machine)


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(JournalError, match=f"in use by process {os.getpid()} on "):
        lock(tmp_path).__enter__()
    with lock(tmp_path):
        pass
    assert (tmp_path / "lock").read_bytes() == b"", "a holder that has ended left something to wait for"


def test_a_killed_holder_on_this_machine_is_no_obstacle(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom evomerge.search import RunLock\n"
        "with RunLock(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert b"pid" in (tmp_path / "lock").read_bytes()
    with RunLock(tmp_path):
        pass


def _leave(folder: Path, **changes: object) -> dict[str, object]:
    """Writes a lock file as left by a holder on another machine, whose flock is not visible here."""
    holder = {"pid": 77, "host": "far", "machine": "there", "token": "t", "heartbeat": "000000000001", **changes}
    descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT)
    try:  # in place, as a holder does: a file truncated first would briefly look as if nobody held it
        os.ftruncate(descriptor, os.pwrite(descriptor, json.dumps(holder).encode(), 0))
    finally:
        os.close(descriptor)
    return holder


def test_a_silent_holder_on_another_machine_is_replaced_after_a_timeout(tmp_path: Path) -> None:
    _leave(tmp_path)
    started = time.monotonic()
    with lock(tmp_path):
        assert time.monotonic() - started >= 4 * BEAT_S


def test_a_live_holder_on_another_machine_is_respected(tmp_path: Path) -> None:
    _leave(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        count = 1
        while not ended.wait(BEAT_S / 2):
            count += 1
            _leave(tmp_path, heartbeat=f"{count:012d}")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(JournalError, match="in use by process 77 on far"):
            RunLock(tmp_path, heartbeat_s=20 * BEAT_S, machine="here").__enter__()
    finally:
        ended.set()
        thread.join()


def test_a_holder_that_slept_through_a_takeover_does_not_write(tmp_path: Path) -> None:
    with lock(tmp_path) as held:
        held.check()
        taken = _leave(tmp_path)
        time.sleep(4 * BEAT_S)
        with pytest.raises(JournalError, match="another process has taken over this run"):
            held.check()
    assert json.loads((tmp_path / "lock").read_text()) == taken, "the new holder's lock was changed"


def test_a_takeover_that_a_heartbeat_has_seen_stops_the_next_write(tmp_path: Path) -> None:
    """Although the lock was confirmed so recently that `check` alone would not look again."""
    with RunLock(tmp_path, heartbeat_s=0.5) as held:
        held.check()
        _leave(tmp_path)
        held._beating.join(timeout=60)
        with pytest.raises(JournalError, match="another process has taken over this run"):
            held.check()


def test_of_two_processes_that_take_over_a_run_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait at the same time, and the second writes its name over that of the first."""
    _leave(tmp_path)
    sleep, other = time.sleep, {"token": "u", "pid": 78}

    def sleep_and_be_overwritten(duration_s: float) -> None:
        sleep(duration_s)
        if json.loads((tmp_path / "lock").read_text())["host"] != "far":
            _leave(tmp_path, **other)

    monkeypatch.setattr(time, "sleep", sleep_and_be_overwritten)
    with pytest.raises(JournalError, match="in use by process 78 on far"):
        lock(tmp_path).__enter__()


def test_a_holder_is_not_confused_with_a_process_that_reuses_its_pid(tmp_path: Path) -> None:
    watch = HolderWatch(tmp_path, heartbeat_s=1000)
    assert watch.look() is None
    with RunLock(tmp_path):
        name, lives = watch.look() or ("", None)
        assert (name.split(" on ")[0], lives) == (f"process {os.getpid()}", True)
        left = json.loads((tmp_path / "lock").read_text())
    _leave(tmp_path, **left)
    assert (watch.look() or ("", None))[1] is True
    _leave(tmp_path, **left | {"process": left["process"] + "0"})
    assert (watch.look() or ("", None))[1] is False, "same pid, but started at another time"
    _leave(tmp_path, **left | {"pid": 2**22 + 1})
    assert (watch.look() or ("", None))[1] is False, "no such process"


def test_a_killed_holder_that_is_still_a_zombie_counts_as_dead(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom evomerge.search import RunLock\n"
        "with RunLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    watch = HolderWatch(tmp_path, heartbeat_s=1000)
    assert (watch.look() or ("", None))[1] is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert (watch.look() or ("", None))[1] is False
    process.wait()


@pytest.mark.parametrize(
    "elsewhere", [{}, {"machine": "here", "process": "4026532000:5"}], ids=["machine", "container"]
)
def test_the_heartbeat_decides_for_a_holder_that_cannot_be_seen(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    """In a container on this machine the same pid means another process, or none."""
    if elsewhere:
        elsewhere = {**elsewhere, "machine": machine_id()}
    watch = HolderWatch(tmp_path, heartbeat_s=BEAT_S)
    _leave(tmp_path, **elsewhere, pid=os.getpid())
    assert watch.look() == (f"process {os.getpid()} on far", None)
    _leave(tmp_path, **elsewhere, pid=os.getpid(), heartbeat="000000000002")
    assert watch.look() == (f"process {os.getpid()} on far", True)
    time.sleep(5 * BEAT_S)
    assert watch.look() == (f"process {os.getpid()} on far", False)
    _leave(tmp_path, **elsewhere | {"token": "another"})
    assert watch.look() == ("process 77 on far", None), "a new holder must be watched afresh"


@pytest.mark.parametrize("content", [b"\0" * 300, b"[]", b'{"pid": 7'])
def test_an_unreadable_lock_file_is_not_a_sign_of_life(tmp_path: Path, content: bytes) -> None:
    """As left by a power loss, or while it is being written."""
    (tmp_path / "lock").write_bytes(content)
    watch = HolderWatch(tmp_path, heartbeat_s=BEAT_S)
    assert watch.look() == ("an unknown process", None)
    time.sleep(5 * BEAT_S)
    assert watch.look() == ("an unknown process", False)
    with lock(tmp_path):
        pass


def test_the_heartbeat_advances(tmp_path: Path) -> None:
    with lock(tmp_path):
        first = (tmp_path / "lock").read_bytes()
        deadline = time.monotonic() + 20
        while (tmp_path / "lock").read_bytes() == first:
            assert time.monotonic() < deadline
            time.sleep(BEAT_S)


def test_without_flock_the_heartbeat_decides_on_one_machine_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(stream: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path) as held:
        with pytest.raises(JournalError, match="in use by process"):
            lock(tmp_path).__enter__()
        held.check()
    with lock(tmp_path):
        pass


def test_a_full_disk_gives_one_clear_message(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom evomerge.core import JournalError\nfrom evomerge.search import RunLock\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n    RunLock(Path(sys.argv[1])).__enter__()\nexcept JournalError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, capture_output=True, text=True
    )
    assert "cannot be written to" in done.stdout
