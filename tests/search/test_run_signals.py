"""How a run reacts to signals, a closed terminal and output that nobody reads."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evomerge.build import open_run, resume_search
from evomerge.core import Split
from evomerge.search import read_journal
from tests.search.small_runs import command, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def _heed_signals() -> None:
    """Restores the default handlers: the test runner may ignore SIGHUP (under nohup) or SIGINT (in the background of a shell)."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _running(tmp_path: Path, config: Path, *settings: str) -> tuple[subprocess.Popen[str], Path]:
    run = tmp_path / "run"
    options = [part for item in ("budget.evaluations=100000", *settings) for part in ("--set", item)]
    process = command("search", config, "--run-dir", run, *options, before=_heed_signals)
    deadline = time.monotonic() + 60
    while not (run / "front.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process, run


def _until_workers_are_busy(run: Path) -> None:
    """Waits until they are in the middle of candidates that take `SLOW`: an interrupt does not wait for work that no worker has started."""
    size = (run / "journal.jsonl").stat().st_size
    deadline = time.monotonic() + 60
    while (run / "journal.jsonl").stat().st_size == size:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)


SLOW = "evaluation={kind: synthetic, function: zdt1, dimension: 4, n_items: 10, delay_s: 0.6}"
ENDLESS = "cluster={kind: local, workers: 2, on_interrupt: abandon}"


@pytest.mark.parametrize(
    ("numbers", "settings"),
    [
        ([signal.SIGINT], [SLOW]),
        ([signal.SIGINT], [SLOW, ENDLESS]),
        ([signal.SIGINT, signal.SIGINT], [SLOW]),
        ([signal.SIGTERM], [SLOW]),
        ([signal.SIGHUP], [SLOW]),
    ],
    ids=["once", "once-abandon", "twice", "term", "hangup"],
)
def test_signals_save_progress_and_say_how_to_continue(
    tmp_path: Path, config: Path, numbers: list[signal.Signals], settings: list[str]
) -> None:
    process, run = _running(tmp_path, config, *settings)
    _until_workers_are_busy(run)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"evomerge resume {run}" in output
    records = read_journal(run / "journal.jsonl")
    asked = {record["id"] for record in records if record["event"] == "asked"}
    done = {record["id"] for record in records if record["event"] == "evaluated"}
    if len(numbers) == 1 and len(settings) == 1 and numbers[0] is signal.SIGINT:
        assert asked == done, "results of running evaluations were not recorded"
    front = json.loads((run / "front.json").read_text())
    assert {member["id"] for member in front["members"]} <= done
    state = resume_search(run, overrides=[f"budget.evaluations={len(asked) + 4}"])
    assert state.n_evaluations[Split.SEARCH] == len(asked) + 4


def _in_a_terminal(*arguments: object, on_hangup: signal.Handlers = signal.SIG_DFL) -> tuple[int, int]:
    """Starts the command in its own terminal; returns its pid and the other end of the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, on_hangup)
        line = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
        os.execv(sys.executable, line)  # noqa: S606
    return pid, terminal


def _read_until(word: bytes, terminal: int) -> None:
    seen = b""
    while word not in seen:
        seen += os.read(terminal, 65536)


def test_closing_the_terminal_saves_as_sigterm_does(tmp_path: Path, config: Path) -> None:
    """The kernel sends SIGHUP, and everything printed from then on fails."""
    run = tmp_path / "run"
    pid, terminal = _in_a_terminal(
        "search", config, "--run-dir", run, "--set", SLOW, "--set", "budget.evaluations=1000"
    )
    _read_until(b"best so far", terminal)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert (run / "lock").read_text() == ""
    n_done = open_run(run).state.n_evaluations[Split.SEARCH]
    assert resume_search(run, overrides=[f"budget.evaluations={n_done + 4}"]).n_evaluations[Split.SEARCH] == n_done + 4


def test_nohup_continues_without_its_terminal(tmp_path: Path, config: Path) -> None:
    run = tmp_path / "run"
    pid, terminal = _in_a_terminal("search", config, "--run-dir", run, "--set", SLOW, on_hangup=signal.SIG_IGN)
    _read_until(b"best so far", terminal)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert open_run(run).state.finished


def test_a_search_whose_output_nobody_reads_continues(tmp_path: Path, config: Path) -> None:
    """As with `| tee log`, where the first Ctrl-C also ends tee."""
    process, run = _running(tmp_path, config, SLOW)
    assert process.stdout is not None
    process.stdout.close()
    time.sleep(1)
    assert process.poll() is None
    _until_workers_are_busy(run)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    records = read_journal(run / "journal.jsonl")
    asked = {record["id"] for record in records if record["event"] == "asked"}
    assert asked == {record["id"] for record in records if record["event"] == "evaluated"}
