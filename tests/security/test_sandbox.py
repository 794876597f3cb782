"""Task code may score answers and nothing else: no network, files, secrets or other processes, and no unlimited time or memory."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from evomerge.core import EvaluationError, Split
from evomerge.engine import Generation, LogLikelihood
from evomerge.evaluation import TaskSpec, load_task
from evomerge.evaluation.sandbox import _ISOLATED, SandboxedTask, check_sandbox
from evomerge.evaluation.task_settings import runs_code, task_settings
from evomerge.testing.tiny_models import write_tiny_llama

ATTEMPTS = """
import ctypes, mmap, os, re, signal, socket, tempfile, threading, time
from pathlib import Path

def blocked(attempt):
    try:
        attempt()
    except (OSError, KeyError, MemoryError):
        return 1.0
    return 0.0

def connect(answer):
    socket.create_connection(("127.0.0.1", int(answer)), 2).close()

def write_beside(answer):
    (Path(__file__).parent / "written").write_text("x")

def overwrite(answer):
    os.truncate(__file__, 0)

def read_secret(answer):
    os.environ["EVOMERGE_TEST_SECRET"]

def read_secret_of_others(answer):
    for place in Path("/proc").glob("[0-9]*/environ"):
        if b"EVOMERGE_TEST_SECRET=" in place.read_bytes():
            return
    raise KeyError

def see_worker(answer):
    os.kill(int(answer), 0)

def see_command_of_others(answer):
    commands = [place.read_bytes() for place in Path("/proc").glob("[0-9]*/cmdline")]
    if f"sleep\\0{answer}\\0".encode() not in commands:
        raise OSError

def see_shared_memory(answer):
    if ctypes.CDLL(None).shmctl(int(answer), 2, ctypes.create_string_buffer(1024)) < 0:  # IPC_STAT
        raise OSError

def take_memory(answer):
    mmap.mmap(-1, 64 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE: only a limit refuses it

def take_disk(answer):
    with tempfile.TemporaryFile() as file:
        file.truncate(2 << 30)

def score(document, results):
    print("task code may print what it likes")
    answer = results[0]
    if answer == "hang":
        time.sleep(600)
    if answer == "die":
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    if answer == "deaf":  # soon: it never lets go of the interpreter
        threading.Timer(0.3, re.match, ("(a+)+$", "a" * 60 + "b")).start()
        return {"exact_match": 1.0}
    if answer == "fail":
        raise KeyError("no gold")
    return {"exact_match": blocked(lambda: globals()[document["q"]](answer))}
"""
NAMES = [
    "connect", "write_beside", "overwrite", "read_secret", "read_secret_of_others", "see_worker", "see_command_of_others",
    "see_shared_memory", "take_memory", "take_disk",
]  # fmt: skip
TASK = {
    "task": "attempts",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"search": "search.jsonl"}},
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "q",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sandbox")
    write_tiny_llama(folder / "model", seed=0)
    (folder / "attempts.py").write_text(ATTEMPTS)
    (folder / "search.jsonl").write_text("".join(json.dumps({"q": name}) + "\n" for name in NAMES))
    (folder / "t.yaml").write_text(json.dumps(TASK)[:-1] + ', "process_results": !function attempts.score}')
    return folder


@pytest.fixture(scope="module")
def task(sandbox: None, folder: Path) -> Iterator[SandboxedTask]:
    os.environ["EVOMERGE_TEST_SECRET"] = "planted"  # noqa: S105
    task = SandboxedTask(TaskSpec(str(folder / "t.yaml")), folder / "model", timeout_s=10)
    del os.environ["EVOMERGE_TEST_SECRET"]
    yield task
    task.close()


def answers(**special: str) -> list[Generation]:
    return [Generation(special.get(name, "1"), 1) for name in NAMES]


def test_everything_but_scoring_is_blocked(task: SandboxedTask, folder: Path) -> None:
    before = (folder / "attempts.py").read_bytes()
    items = task.items(Split.SEARCH)
    assert (task.name, task.metric, len(items), len(items.generations)) == ("attempts", "exact_match", 10, 10)
    assert [items.target(number) for number in range(11)] == [*NAMES, None]
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as other:
        libc, port = ctypes.CDLL(None), server.getsockname()[1]
        segment = libc.shmget(0, 4096, 0o600)
        assert libc.shmctl(segment, 2, ctypes.create_string_buffer(1024)) == 0, (
            "the segment should be visible to this process"
        )
        told = {"connect": port, "see_worker": os.getpid(), "see_command_of_others": 60, "see_shared_memory": segment}
        try:
            scores = items.score([], answers(**{name: str(answer) for name, answer in told.items()}))
        finally:
            libc.shmctl(segment, 0, None)
            other.kill()
    assert dict(zip(NAMES, scores.tolist(), strict=True)) == dict.fromkeys(NAMES, 1.0)
    assert (folder / "attempts.py").read_bytes() == before
    assert not (folder / "written").exists()


CHOICES = """
def score(document, results):
    (first, _), (_, is_greedy) = results
    return {"acc": first + 10.0 * is_greedy}
"""


def test_choices_are_requested_and_scored_as_without_a_sandbox(sandbox: None, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "choices.py").write_text(CHOICES)
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    choices = {"output_type": "multiple_choice", "doc_to_choice": ["yes", "not at all"], "doc_to_target": 0, "metric_list": [metric]}  # fmt: skip
    settings = {key: value for key, value in TASK.items() if key != "generation_kwargs"} | choices
    (tmp_path / "t.yaml").write_text(json.dumps(settings)[:-1] + ', "process_results": !function choices.score}')
    spec = TaskSpec(str(tmp_path / "t.yaml"))
    task = SandboxedTask(spec, folder / "model", timeout_s=30)
    items = task.items(Split.SEARCH)
    found = [LogLikelihood(-float(number), number % 3 == 0) for number in range(2 * len(NAMES))]
    scores = items.score(found, [])
    task.close()
    plain = load_task(spec, AutoTokenizer.from_pretrained(folder / "model"), trust_code=True).items(Split.SEARCH)
    assert (items.likelihoods, items.generations, items.counts) == (plain.likelihoods, (), plain.counts)
    assert scores.tolist() == plain.score(found, []).tolist()
    assert scores[:3].tolist() == [0.0, -2.0 + 10.0, -4.0]


def test_search_items_are_drawn_inside_the_sandbox(sandbox: None, folder: Path) -> None:
    task = SandboxedTask(TaskSpec(str(folder / "t.yaml"), search_items=3), folder / "model", timeout_s=10)
    items = task.items(Split.SEARCH)
    names = [items.target(number) for number in range(3)]
    scores = items.score([], [Generation("1", 1)] * 3)
    task.close()
    assert len(items) == len(scores) == 3
    assert names == [name for name in NAMES if name in names]
    assert items.represents == len(NAMES) / 3


@pytest.mark.usefixtures("sandbox")
def test_isolated_processes_end_with_the_worker() -> None:
    """Even if the worker is killed and cannot end them, and their code does not check its input."""
    worker = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *_ISOLATED, "sleep", "600"])  # fmt: skip
    inside: list[psutil.Process] = []
    while not any(process.name() == "sleep" for process in inside):
        inside = psutil.Process(worker.pid).children(recursive=True)
    worker.kill()
    worker.wait()
    _, alive = psutil.wait_procs(inside, timeout=30)
    for process in alive:
        process.kill()
    assert not alive


def test_task_code_is_refused_if_isolating_a_process_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, timeout: float, **settings: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr("subprocess.run", run)
    check_sandbox.cache_clear()
    with pytest.raises(
        EvaluationError, match="an isolated process did not end within 60 s, so task code cannot be isolated"
    ):
        check_sandbox()


COUNTING = """
import os, time

def score(document, results):
    time.sleep(0.05)
    if results[0] == "die":
        os._exit(1)
    if results[0] == "fail":
        raise KeyError(document["q"])
    return {"exact_match": float(os.getpid()) if results[0] == "who" else float(len(results[0])) / 10}
"""


@pytest.mark.usefixtures("sandbox")
def test_answers_are_scored_by_several_processes(folder: Path, tmp_path: Path) -> None:
    """The scores and their order are the same, and so is the first failure, as with one process."""
    rows = [{"q": f"item {number}"} for number in range(12)]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "counting.py").write_text(COUNTING)
    (tmp_path / "t.yaml").write_text(json.dumps(TASK)[:-1] + ', "process_results": !function counting.score}')
    found = []
    for processes in (1, 3):
        task = SandboxedTask(TaskSpec(str(tmp_path / "t.yaml")), folder / "model", timeout_s=30, processes=processes)
        items = task.items(Split.SEARCH)
        who = set(items.score([], [Generation("who", 1)] * 12).tolist())
        assert (len(who) > 1) == (processes > 1)
        scores = items.score([], [Generation("x" * (number % 5 + 1), 1) for number in range(12)]).tolist()
        with pytest.raises(EvaluationError) as failure:
            items.score([], [Generation("fail" if number in (4, 9) else "x", 1) for number in range(12)])
        assert "item 4: the scorer fails: KeyError('item 4')" in str(failure.value)
        with pytest.raises(EvaluationError):
            items.score([], [Generation("die" if number == 7 else "x", 1) for number in range(12)])
        assert items.score([], [Generation("x", 1)] * 12).tolist() == [0.1] * 12, "the next candidate should be scored"
        task.close()
        found.append(scores)
    assert found[0] == found[1] == [(number % 5 + 1) / 10 for number in range(12)]


RATIOS = """
def score(document, results):
    return {"exact_match": (len(results[0]), len(document["q"]))}

def ratio(pairs):
    return sum(one for one, _ in pairs) / sum(other for _, other in pairs)
"""


@pytest.mark.usefixtures("sandbox")
def test_a_tasks_own_aggregation_runs_in_the_sandbox_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ratios.py").write_text(RATIOS)
    metric = '[{"metric": "exact_match", "aggregation": !function ratios.ratio, "higher_is_better": true}]'
    settings = {key: value for key, value in TASK.items() if key != "metric_list"}
    (tmp_path / "t.yaml").write_text(
        json.dumps(settings)[:-1] + f', "process_results": !function ratios.score, "metric_list": {metric}}}'
    )
    task = SandboxedTask(TaskSpec(str(tmp_path / "t.yaml")), folder / "model", timeout_s=30, processes=2)
    scores = task.items(Split.SEARCH).score([], answers(connect="xxxx"))
    task.close()
    assert scores.mean() == pytest.approx((4 + len(NAMES) - 1) / sum(map(len, NAMES)))
    assert scores.argmax() == NAMES.index("connect")


def test_a_failing_scorer_fails_one_candidate(task: SandboxedTask) -> None:
    with pytest.raises(EvaluationError, match=r"item 2: the scorer fails: KeyError\('no gold'\)"):
        task.items(Split.SEARCH).score([], answers(overwrite="fail"))
    assert task.items(Split.SEARCH).score([], answers()).sum() >= len(NAMES) - 1


def test_code_that_hangs_is_killed_and_the_next_candidate_is_scored(task: SandboxedTask) -> None:
    process = task._process
    assert process is not None
    task._timeout_s, usual = 1.0, task._timeout_s
    with pytest.raises(EvaluationError, match="took more than 1 s"):
        task.items(Split.SEARCH).score([], answers(connect="hang"))
    task._timeout_s = usual
    assert process.returncode == -signal.SIGKILL
    assert task.items(Split.SEARCH).score([], answers()).sum() >= len(NAMES) - 1
    with pytest.raises(EvaluationError, match="its sandbox died"):
        task.items(Split.SEARCH).score([], answers(connect="die"))


def test_code_that_stops_reading_is_killed_too(folder: Path, task: SandboxedTask) -> None:
    """A request that does not fit into the pipe is not waited for indefinitely."""
    deaf = SandboxedTask(TaskSpec(str(folder / "t.yaml")), folder / "model", timeout_s=3)
    items = deaf.items(Split.SEARCH)
    assert items.score([], answers(connect="deaf"))[0] == 1.0
    time.sleep(1)
    with pytest.raises(EvaluationError, match="its code took more than 3 s"):
        items.score([], answers(connect="x" * (1 << 20)))
    deaf.close()


def test_a_task_that_cannot_be_loaded_leaves_no_process(task: SandboxedTask, folder: Path, tmp_path: Path) -> None:
    """Neither at first nor after a process has died, and the reason is given each time."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = SandboxedTask(TaskSpec(str(tmp_path / "t.yaml")), folder / "model", timeout_s=10)
    items = other.items(Split.SEARCH)
    with pytest.raises(EvaluationError, match="its sandbox died"):
        items.score([], answers(connect="die"))
    (tmp_path / "search.jsonl").unlink()
    before = set(psutil.Process().children())
    for _ in range(2):
        with pytest.raises(EvaluationError, match=r"data file of split 'search' does not exist"):
            items.score([], answers())
    with pytest.raises(EvaluationError, match=r"data file of split 'search' does not exist") as refused:
        SandboxedTask(TaskSpec(str(tmp_path / "t.yaml")), folder / "model", timeout_s=10)
    assert "Hugging Face caches" not in str(refused.value), "the user's own file does not need the Hugging Face caches"
    assert set(psutil.Process().children()) <= before


def test_without_isolation_the_task_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EvaluationError, match=r"setpriv \(util-linux\) is not installed, so task code"):
        SandboxedTask(TaskSpec(str(folder / "t.yaml")), folder / "model", timeout_s=1)
    for program in ("setpriv", "unshare"):
        (tmp_path / program).write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    with pytest.raises(EvaluationError, match=r"cannot isolate a process .*Operation not permitted"):
        SandboxedTask(TaskSpec(str(folder / "t.yaml")), folder / "model", timeout_s=1)
    check_sandbox.cache_clear()


def test_task_code_is_detected_before_it_is_imported(folder: Path) -> None:
    assert runs_code(str(folder / "t.yaml"))
    assert runs_code("humaneval")
    assert not runs_code("gsm8k")
    with pytest.raises(EvaluationError, match="runs code that the model writes"):
        task_settings("humaneval", trust_code=False)
    with pytest.raises(EvaluationError, match="trust_task_code"):
        load_task(TaskSpec(str(folder / "t.yaml")), None)


CODE = '''
import subprocess, sys

def with_prompt(resps, docs):
    return [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(resps, docs)]

def pass_at_1(references, predictions):
    """As the metric of HumanEval: runs what the model wrote, then the reference's assertions, in a process of its own."""
    program = predictions[0][0] + "\\n" + references[0]
    return float(subprocess.run([sys.executable, "-c", program], timeout=5).returncode == 0)
'''
HUMANEVAL = """
task: squares
dataset_path: json
dataset_kwargs: {data_files: {search: problems.jsonl}}
unsafe_code: true
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}"
generation_kwargs: {until: ["\\ndef"], max_gen_toks: 32}
metric_list:
  - {metric: !function pass_at_1.pass_at_1, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: create_test, filter: [{function: custom, filter_fn: !function pass_at_1.with_prompt}]}
"""


@pytest.mark.usefixtures("sandbox")
def test_a_task_shaped_like_humaneval_runs_the_models_code(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", seed=0)
    problem = {"prompt": "def square(x):\n", "test": "assert square(-3) == 9"}
    (tmp_path / "problems.jsonl").write_text(f"{json.dumps(problem)}\n" * 4)
    (tmp_path / "pass_at_1.py").write_text(CODE)
    (tmp_path / "squares.yaml").write_text(HUMANEVAL)
    task = SandboxedTask(TaskSpec(str(tmp_path / "squares.yaml")), tmp_path / "model", timeout_s=60)
    written = tmp_path / "written"
    answers = ["    return x * x", "    return x + x", "    return (", f"    open({str(written)!r}, 'w'); return 9"]
    scores = task.items(Split.SEARCH).score([], [Generation(answer, 8) for answer in answers])
    task.close()
    assert (task.metric, task.filter) == ("pass_at_1", "create_test")
    assert scores.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not written.exists()
