"""An unforeseen error: traceback, a short message, exit code 1, and a run that can be resumed where it stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evomerge.build import open_run

FAULT = """
from evomerge.search.loop import SearchLoop

tell_next = SearchLoop._tell_next

def fail(self):
    if len(self.state.evaluations) > 8:
        raise ZeroDivisionError("provoked")
    return tell_next(self)

SearchLoop._tell_next = fail
"""
SETTINGS = {
    "strategy": "cma_es",
    "evaluation": {"kind": "synthetic", "dimension": 3, "n_items": 10},
    "budget": {"evaluations": 30},
    "finals": {"finalists": 2},
    "deterministic": True,
}


def run(*arguments: object, fault: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{fault}\nfrom evomerge.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_search_that_crashes_can_be_resumed(tmp_path: Path, kind: str) -> None:
    config = tmp_path / "search.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "cluster": {"kind": kind, "workers": 2}}))
    broken = run("search", config, "--run-dir", tmp_path / "run", fault=FAULT)
    assert broken.returncode == 1, broken.stderr
    trace, _, message = broken.stderr.partition("\ninternal error: ZeroDivisionError: provoked\n")
    assert "Traceback (most recent call last)" in trace
    assert "in fail" in trace
    assert "Every finished evaluation is saved" in message
    assert "evomerge resume" not in trace, "the advice should appear once, at the end"
    assert message.splitlines()[0] == "This is a bug in evomerge or a library; the traceback is above."
    assert f"evomerge resume {tmp_path / 'run'}" in message
    assert str(tmp_path / "run" / "logs") in message
    assert len(message.splitlines()) < 6
    assert (tmp_path / "run" / "lock").read_text() == "", "the run is still locked"
    assert 0 < len(open_run(tmp_path / "run").state.evaluations) < 30

    resumed = run("resume", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    whole = run("search", config, "--run-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "run" / "front.json").read_bytes() == (tmp_path / "whole" / "front.json").read_bytes()


@pytest.mark.parametrize("before", [0, 8])
def test_a_search_whose_workers_cannot_start_can_be_resumed(tmp_path: Path, before: int) -> None:
    config = tmp_path / "search.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "cluster": {"kind": "local", "workers": 1}}))
    fault = FAULT.replace('ZeroDivisionError("provoked")', 'EngineError("worker 0 cannot start: provoked")')
    fault = fault.replace("> 8", f">= {before}")
    broken = run(
        "search", config, "--run-dir", tmp_path / "run", fault=f"from evomerge.core import EngineError\n{fault}"
    )
    assert broken.returncode == 2
    assert "Traceback" not in broken.stderr
    resume, logs = f"  evomerge resume {tmp_path / 'run'}\n", f"Worker logs: {tmp_path / 'run' / 'logs'}\n"
    advice = (
        f"Every finished evaluation is saved. Once the problem is fixed, continue with:\n{resume}"
        if before
        else f"Nothing has been evaluated yet. Once the problem is fixed:\n{resume}"
        f"or, if it is in the configuration, start the search again with --run-dir {tmp_path / 'run'}\n"
    )
    assert broken.stderr.endswith(f"error: worker 0 cannot start: provoked\n{advice}{logs}")


def test_other_commands_report_an_internal_error(tmp_path: Path) -> None:
    fault = "import evomerge.build\ndef fail(folder):\n    raise ZeroDivisionError('provoked')\nevomerge.build.open_run = fail"
    broken = run("front", tmp_path, fault=fault)
    assert broken.returncode == 1
    assert broken.stderr.startswith("Traceback (most recent call last)")
    assert broken.stderr.endswith(
        "\ninternal error: ZeroDivisionError: provoked\nThis is a bug in evomerge or a library; the traceback is above.\n"
    )


def test_missing_permissions_are_not_an_internal_error(tmp_path: Path) -> None:
    fault = "import evomerge.build\ndef fail(folder):\n    raise PermissionError(13, 'Permission denied', '/home/other/run')\nevomerge.build.open_run = fail"
    refused = run("front", tmp_path, fault=fault)
    assert refused.returncode == 2
    assert (
        refused.stderr == "error: /home/other/run: permission denied; change its permissions, or choose another path\n"
    )


def test_a_name_that_is_too_long_is_not_an_internal_error(tmp_path: Path) -> None:
    refused = run("front", tmp_path / ("x" * 300))
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {tmp_path / 'xxx'}")
    assert refused.stderr.endswith(": the name is longer than the file system allows\n")


def test_a_full_disk_is_not_an_internal_error() -> None:
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", "doctor", "--json"]
    with Path("/dev/full").open("w") as full:
        refused = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert refused.stderr == "error: cannot be written: no space is left on the disk\n"


def test_characters_the_terminal_lacks_are_not_an_internal_error(tmp_path: Path) -> None:
    config = tmp_path / "search.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "cluster": {"kind": "local"}}))
    command = [sys.executable, "-m", "evomerge", "search", config, "--run-dir", tmp_path / "r\u00fcn"]
    said = subprocess.run(
        command, capture_output=True, timeout=120, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert said.returncode == 0, said.stderr
    assert rb"r\xfcn" in said.stdout


def test_a_closed_output_pipe_is_not_an_internal_error(tmp_path: Path) -> None:
    """`evomerge ... | head`: nothing is printed, and the exit code does not claim that everything was done."""
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
