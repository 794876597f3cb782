"""A deterministic run that is killed repeatedly ends as if nothing had happened."""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

N_KILLS = 20

CONFIG = """
seed: 5
strategy: {name: nsga2, population_size: 8}
evaluation: {kind: synthetic, function: zdt1, dimension: 6, item_noise: 0.02, n_items: 20, delay_s: 0.02, failure_rate: 0.05}
cluster: {kind: local, workers: 3}
budget: {evaluations: 150}
finals: {finalists: 4}
deterministic: true
"""


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _finish(*arguments: str) -> str:
    process = _start(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kill") / "search.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    run = config.parent / "undisturbed"
    _finish("search", str(config), "--run-dir", str(run))
    return run


def _evaluations(run: Path) -> list[tuple[str, str]]:
    events = [json.loads(line[9:]) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [(event["id"], event["split"]) for event in events if event["event"] == "evaluated"]


def test_sigkill_at_random_moments_changes_nothing(config: Path, undisturbed: Path) -> None:
    run = config.parent / "killed"
    instants = random.Random(3)
    process = _start("search", str(config), "--run-dir", str(run))
    n_kills = 0
    while n_kills < N_KILLS:
        # until it is at work again after its first record, then at a random moment
        before = (run / "journal.jsonl").stat().st_size if (run / "journal.jsonl").exists() else 0
        while process.poll() is None and (
            not (run / "journal.jsonl").exists() or (run / "journal.jsonl").stat().st_size <= before
        ):
            time.sleep(0.005)
        time.sleep(instants.uniform(0, 0.12))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        n_kills += 1
        process = _start("resume", str(run))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    assert n_kills == N_KILLS, f"the run was over after only {n_kills} kills"

    assert (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()
    counts = Counter(_evaluations(run))
    assert max(counts.values()) == 1, "an evaluation was paid for twice"
    assert set(counts) == set(_evaluations(undisturbed)), "an evaluation was lost or invented"


def test_two_runs_with_the_same_seed_are_byte_identical(config: Path, undisturbed: Path) -> None:
    run = config.parent / "again"
    _finish("search", str(config), "--run-dir", str(run))
    assert (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()


def test_a_different_seed_gives_a_different_front(config: Path, undisturbed: Path) -> None:
    run = config.parent / "other"
    _finish("search", str(config), "--run-dir", str(run), "--set", "seed=6")
    assert (run / "front.json").read_bytes() != (undisturbed / "front.json").read_bytes()


def test_ctrl_c_saves_and_says_how_to_continue(config: Path, undisturbed: Path) -> None:
    run = config.parent / "interrupted"
    process = _start("search", str(config), "--run-dir", str(run))
    # late enough that proposals depend on earlier results
    while not (run / "front.json").exists() or (run / "journal.jsonl").read_bytes().count(b'"event":"evaluated"') < 40:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"evomerge resume {run}" in output.decode()
    finished = _evaluations(run)
    _finish("resume", str(run))
    assert (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()
    assert _evaluations(run)[: len(finished)] == finished


def test_a_second_process_is_refused(config: Path) -> None:
    run = config.parent / "busy"
    process = _start("search", str(config), "--run-dir", str(run), "--set", "budget.evaluations=100000")
    while not (run / "front.json").exists():
        time.sleep(0.01)
    second = _start("resume", str(run))
    output, _ = second.communicate(timeout=60)
    process.kill()
    process.wait()
    assert second.returncode == 2
    assert f"in use by process {process.pid}" in output.decode()


def test_a_raised_budget_continues_the_run(config: Path) -> None:
    run = config.parent / "raised"
    _finish("search", str(config), "--run-dir", str(run), "--set", "budget.evaluations=20")
    _finish("resume", str(run), "--set", "budget.evaluations=30")
    assert json.loads((run / "summary.json").read_text())["evaluations"] == 30


def test_a_run_with_nothing_left_to_do_says_so_and_restores_its_files(config: Path) -> None:
    run = config.parent / "done"
    _finish("search", str(config), "--run-dir", str(run), "--set", "budget.evaluations=20")
    before, journal = (run / "front.json").read_bytes(), (run / "journal.jsonl").read_bytes()
    (run / "front.json").unlink()
    (run / "summary.json").unlink()
    output = _finish("resume", str(run))
    assert (
        f"budget.evaluations: 20 is used up. To search further: evomerge resume {run} --set budget.evaluations=40"
        in output
    )
    assert ((run / "front.json").read_bytes(), (run / "summary.json").exists()) == (before, True)
    assert (run / "journal.jsonl").read_bytes() == journal
    lowered = _finish("resume", str(run), "--set", "budget.evaluations=10")
    assert "budget.evaluations: 10 is used up." in lowered
    assert "--set budget.evaluations=40" in lowered, "the suggestion is not twice the evaluations already done"
    assert "used up" not in _finish("resume", str(run), "--set", "budget.evaluations=20", "--set", "finals.finalists=3")
    assert "used up" not in _finish("resume", str(run), "--set", "budget.evaluations=25")


CMA_CONFIG = """
seed: 5
strategy: {name: cma_es, population_size: 6}
evaluation: {kind: synthetic, function: sphere, dimension: 6}
cluster: {kind: local, workers: 2}
budget: {evaluations: 60}
deterministic: true
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="OpenBLAS's kernels are chosen by their x86 names")
def test_a_run_continues_on_a_processor_that_rounds_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "search.yaml").write_text(CMA_CONFIG)
    run = tmp_path / "run"
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    _finish("search", str(tmp_path / "search.yaml"), "--run-dir", str(run))
    before = (run / "journal.jsonl").read_bytes()
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    output = _finish("resume", str(run), "--set", "budget.evaluations=90")
    assert "cannot be reproduced here" in output
    assert (run / "journal.jsonl").read_bytes().startswith(before)
    counted = Counter(_evaluations(run))
    assert max(counted.values()) == 1
    assert sum(split == "search" for _, split in counted) == 90
