"""A vLLM engine that is killed in the middle of a candidate: it is replaced, the candidate is retried, and nothing is left behind."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from evomerge.search import read_journal
from evomerge.testing.engines import cannot_start
from evomerge.testing.tiny_models import write_tiny_llama

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(cannot_start("vllm")), reason=cannot_start("vllm")),
]

TASK = {
    "task": "letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"search": "search.jsonl"}},
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "a",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for index, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=index, hidden=128)
    rows = [{"q": f"item {index} is", "a": chr(97 + index % 26)} for index in range(120)]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(yaml.safe_dump(TASK))
    settings = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "tasks": ["letters.yaml"],
        "strategy": "random",
        "engine": {
            "kind": "vllm",
            "max_model_len": 128,
            "options": {"kv_cache_memory_bytes": 32 << 20},
        },
        "cluster": {"workers": 1},
        "baselines": {"task_arithmetic": []},
        "budget": {"evaluations": 100_000},
        "finals": {"finalists": 0},
    }
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _wait_for(run: Path, process: "subprocess.Popen[str]", kind: str, count: int) -> list[dict[str, Any]]:
    """The journal, as soon as it contains `count` events of this kind."""
    deadline = time.monotonic() + 360
    while True:
        events = read_journal(run / "journal.jsonl") if (run / "journal.jsonl").exists() else []
        if sum(event["event"] == kind for event in events) >= count:
            return events
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, f"fewer than {count} events {kind!r}"
        time.sleep(0.05)


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    """The pool's workers; Ray's actors rename themselves."""
    found = []
    for process in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
    return found


def test_a_killed_engine_is_replaced_and_leaves_nothing_behind(
    config: Path, tmp_path: Path, left_in_shared_memory: Callable[[], set[str]]
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        "from evomerge.cli import main; main()",
        "search",
        str(config),
        "--run-dir",
        str(run),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _wait_for(run, process, "evaluated", 6)
        driver = psutil.Process(process.pid)
        (worker,) = _workers(driver)
        its_own = worker.children(recursive=True)
        worker.kill()
        events = _wait_for(run, process, "lost", 1)
        lost = next(event for event in events if event["event"] == "lost")
        _, alive = psutil.wait_procs([worker, *its_own], timeout=30)
        assert alive == [], "processes that the engine had started are still alive"
        count = sum(event["event"] == "evaluated" for event in events)
        events = _wait_for(run, process, "evaluated", count + 4)
        again = [event for event in events if event["event"] == "evaluated" and event["id"] == lost["id"]]
        assert [event["status"] for event in again] == ["ok"], "the candidate should be retried exactly once"
        assert len(_workers(driver)) == 1, "one worker should have taken its place"
        family = driver.children(recursive=True)
        process.terminate()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 130, output
        _, alive = psutil.wait_procs(family, timeout=90)
        assert alive == []
    finally:
        process.kill()
        process.wait()
    assert left_in_shared_memory() == set()
