"""How a run copes with a misbehaving environment: full and read-only disks, clocks, edited files."""

import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.build import config_on_resume, open_run, parse_config, resume_search, start_search
from evomerge.build.commands.watching import Watcher
from evomerge.core import ConfigError, Evaluation, EvaluationError, EvaluationRequest, JournalError, Split, Status
from evomerge.evaluation import SyntheticEvaluator
from evomerge.search import read_journal
from tests.search.small_runs import SETTINGS, command, start, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_a_run_stopped_during_startup_can_be_resumed_or_started_again(tmp_path: Path) -> None:
    """It has no journal, or one without results: `front` reports that, and both `resume` and a new search start it."""
    start(tmp_path / "whole")
    for number, journal in enumerate(
        (None, b"", (tmp_path / "whole" / "journal.jsonl").read_bytes().split(b"\n")[0] + b"\n")
    ):
        for again in (resume_search, start):
            run = tmp_path / f"{again.__name__}{number}"
            run.mkdir()
            for name in ("config.yaml", "resolved.json"):
                (run / name).write_bytes((tmp_path / "whole" / name).read_bytes())
            if journal is not None:
                (run / "journal.jsonl").write_bytes(journal)
            if not journal:
                with pytest.raises(JournalError, match="nothing has been evaluated yet"):
                    open_run(run).front()
            again(run)
            assert (run / "front.json").read_bytes() == (tmp_path / "whole" / "front.json").read_bytes()
            with pytest.raises(ConfigError, match="already holds a run"):
                start(run)


def test_files_that_belong_to_no_run_are_not_overwritten(tmp_path: Path) -> None:
    for name in ("config.yaml", "front.json", "best.yaml"):
        (tmp_path / name).write_text("mine: 1\n")
    with pytest.raises(
        ConfigError,
        match=r"is not a run directory but contains config.yaml, front.json, best.yaml, .* another --run-dir",
    ):
        start(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.yaml", "config.yaml", "front.json"]


def test_searches_started_in_the_same_second_get_separate_directories(config: Path) -> None:
    ask = f"from evomerge.build import default_run_directory, load_config as l; print(default_run_directory(l({str(config)!r}), 'search.yaml'))"
    names = [
        subprocess.run(
            [sys.executable, "-c", f"import datetime\n{ask}"], capture_output=True, text=True, check=True
        ).stdout
        for _ in "ab"
    ]
    assert all(re.fullmatch(r"runs/search-\d{8}-\d{6}-\d+\n", name) for name in names)
    assert len({name.rpartition("-")[2] for name in names}) == 2


def test_a_folder_with_spaces_is_quoted_for_the_shell(tmp_path: Path) -> None:
    start(tmp_path / "my run", finals={"finalists": 0})
    with pytest.raises(ConfigError, match=r"continue it with `evomerge resume '.*/my run'`"):
        start(tmp_path / "my run")


def test_resuming_after_the_strategy_has_stopped_starts_no_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {
        "strategy": {"name": "cma_es", "restarts": "none"},
        "evaluation": {"kind": "synthetic", "dimension": 2},
        "budget": {"evaluations": 5000},
    }
    assert "evaluations" not in start(tmp_path / "run", **changes).stopped
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    resume_search(tmp_path / "run")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
    assert "nothing left to do: the strategy has stopped by itself (tol" in caplog.text


def test_the_hours_advised_for_searching_further_are_not_used_up_yet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Finals take time too, perhaps more than the search."""
    start(tmp_path / "run", budget={"hours": 2e-4})
    resume_search(tmp_path / "run")
    assert "budget.hours: 0.0002 is used up" in caplog.text
    assert "--set budget.hours=2" in caplog.text


def test_a_budget_that_is_used_up_before_the_first_candidate_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nothing has been evaluated"):
        start(tmp_path / "run", budget={"hours": 1e-9})


def test_a_run_can_end_before_its_first_generation(tmp_path: Path) -> None:
    """As it is told to when every candidate fails."""
    start(tmp_path / "run", strategy={"name": "nsga2", "population_size": 30}, finals={"finalists": 0})
    for evaluations in (20, 31):
        state = resume_search(tmp_path / "run", overrides=[f"budget.evaluations={evaluations}"])
    assert state.n_evaluations[Split.SEARCH] == 31


def test_changed_package_versions_are_reported_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path / "run")
    path = tmp_path / "run" / "resolved.json"
    resolved = json.loads(path.read_text())
    path.write_text(json.dumps({**resolved, "versions": {**resolved["versions"], "numpy": "1.0"}}))
    resume_search(tmp_path / "run")
    assert f"this session has numpy {resolved['versions']['numpy']} instead of 1.0:" in caplog.text
    caplog.clear()
    resume_search(tmp_path / "run")
    assert "this session has" not in caplog.text


def test_a_lost_journal_is_reported(tmp_path: Path) -> None:
    start(tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    for use in (open_run, resume_search, start):
        with pytest.raises(JournalError, match="is missing, and the run cannot be read without it"):
            use(tmp_path / "run")


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, config: Path) -> None:
    """The kernel refuses to let any file grow beyond 9,000 bytes, which happens in the middle of the run."""
    run = tmp_path / "run"

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))

    process = command("search", config, "--run-dir", run, before=small_disk)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "cannot be written" in output
    assert "resume" in output
    assert "Traceback" not in output
    finished = [record for record in read_journal(run / "journal.jsonl") if record["event"] == "evaluated"]
    assert finished
    state = resume_search(run)
    assert state.finished
    again = [record for record in read_journal(run / "journal.jsonl") if record["event"] == "evaluated"]
    assert again[: len(finished)] == finished
    start(tmp_path / "undisturbed")
    assert (run / "front.json").read_bytes() == (tmp_path / "undisturbed" / "front.json").read_bytes()


def test_a_read_only_run_directory_gives_one_clear_message(tmp_path: Path) -> None:
    start(tmp_path / "run")
    folder = tmp_path / "run"
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:  # permissions do not stop root, but /proc does
        folder = Path("/proc/self/task") / str(os.getpid())
        with pytest.raises(ConfigError, match="cannot be created"):
            start(folder / "run")
        return
    with pytest.raises(JournalError, match="cannot be written to"):
        resume_search(folder)


def test_clocks_that_go_backwards_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is measured with monotonic clocks only: here the wall clock goes back a day each time it is read."""
    start(tmp_path / "usual")
    now = time.time()

    def backwards() -> float:
        nonlocal now
        now -= 86_400
        return now

    monkeypatch.setattr(time, "time", backwards)
    state = start(tmp_path / "run", budget={"evaluations": 30, "hours": 1})
    monkeypatch.undo()
    assert state.elapsed_s >= 0
    assert state.n_evaluations[Split.SEARCH] == 30
    assert (tmp_path / "run" / "front.json").read_bytes() == (tmp_path / "usual" / "front.json").read_bytes()
    elapsed = [r["elapsed_s"] for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["event"] == "evaluated"]
    assert elapsed == sorted(elapsed)


def _edit(run: Path, **changes: Any) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def test_an_edited_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    start(tmp_path / "run")
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    _edit(tmp_path / "run", seed=4, evaluation={**SETTINGS["evaluation"], "dimension": 5}, name="x")
    with pytest.raises(ConfigError) as caught:
        resume_search(tmp_path / "run")
    message = str(caught.value)
    for part in ("seed: 3 -> 4", "evaluation.dimension: 4 -> 5", 'name: (absent) -> "x"', "budget, cluster, finals"):
        assert part in message
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_an_invalid_edit_is_reported_with_its_file(tmp_path: Path) -> None:
    start(tmp_path / "run")
    _edit(tmp_path / "run", cluster={"kind": "local", "workers": "two"})
    with pytest.raises(ConfigError, match=r"/run/config\.yaml: 1 problem\n.*cluster\.workers"):
        resume_search(tmp_path / "run")


def test_a_damaged_resolved_json_is_reported(tmp_path: Path) -> None:
    start(tmp_path / "run")
    path = tmp_path / "run" / "resolved.json"
    resolved = json.loads(path.read_text())
    for change, part in (
        ({"config": []}, "config: "),
        ({"models": 1}, "models: "),
        ({"space": {}}, "space: fingerprint: "),
        ({"space": resolved["space"] | {"parameters": [["x0"]]}}, "space: parameters: 0: "),
        ({"versions": ["numpy"]}, "versions: "),
        ({"checkout": "0123abcd"}, "checkout: "),
    ):
        path.write_text(json.dumps(resolved | change))
        for use in (open_run, resume_search):
            with pytest.raises(
                JournalError, match=rf"resolved\.json: {part}.*; the file is damaged or does not belong to a run"
            ):
                use(tmp_path / "run")
    path.write_text("{")
    with pytest.raises(JournalError, match=r"resolved\.json: .*; the file is damaged"):
        open_run(tmp_path / "run")


def test_edits_of_changeable_settings_take_effect(tmp_path: Path) -> None:
    start(tmp_path / "run")
    _edit(tmp_path / "run", budget={"evaluations": 40}, cluster={"kind": "local", "workers": 5})
    state = resume_search(tmp_path / "run")
    assert state.n_evaluations[Split.SEARCH] == 40
    sessions = [r for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["event"] == "session"]
    assert [record["workers"] for record in sessions] == [2, 5]
    start(tmp_path / "at-once", budget={"evaluations": 40})
    assert (tmp_path / "run" / "front.json").read_bytes() == (tmp_path / "at-once" / "front.json").read_bytes()
    resume_search(tmp_path / "run", overrides=["cluster.workers=1", "budget.evaluations=45"])


def test_a_section_added_by_an_edit_keeps_what_the_command_line_had_set(tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "cluster"}
    config = parse_config(settings, folder=Path("/"), overrides=["cluster.kind=local", "cluster.workers=3"])
    start_search(config, tmp_path / "run", config_text=yaml.safe_dump(settings))
    _edit(tmp_path / "run", cluster={"max_attempts": 4})
    resumed = config_on_resume(tmp_path / "run").cluster
    assert (resumed.kind, resumed.workers, resumed.max_attempts) == ("local", 3, 4)


def test_a_search_that_only_fails_stops_before_its_finals_and_continues_once_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks every candidate would break the finals too, and those are held only once."""
    evaluate = SyntheticEvaluator.evaluate
    calls = itertools.count(1)

    def breaking(evaluator: SyntheticEvaluator, request: EvaluationRequest) -> Evaluation:
        if next(calls) <= 5:
            return evaluate(evaluator, request)
        return Evaluation(request.candidate_id, request.split, Status.FAILED, error="the GPU is gone")

    monkeypatch.setattr(SyntheticEvaluator, "evaluate", breaking)
    with pytest.raises(
        EvaluationError, match=r"3\d candidates failed in a row; the last error: the GPU is gone(.|\n)*resume"
    ):
        start(tmp_path / "run", budget={"evaluations": 60})
    state = open_run(tmp_path / "run").state
    assert (state.n_evaluations[Split.SEARCH], state.n_evaluations[Split.SELECT]) == (36, 0)
    assert len(json.loads((tmp_path / "run" / "front.json").read_text())["members"]) > 0
    assert "resume" in Watcher(tmp_path / "run").look().status
    monkeypatch.undo()
    state = resume_search(tmp_path / "run")
    assert state.finished
    assert state.n_evaluations[Split.SEARCH] == 60


@pytest.mark.parametrize("split", [Split.SELECT, Split.REPORT])
def test_failed_finals_are_repeated_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Split) -> None:
    evaluate = SyntheticEvaluator.evaluate

    def breaking(evaluator: SyntheticEvaluator, request: EvaluationRequest) -> Evaluation:
        if request.split is split:
            return Evaluation(request.candidate_id, request.split, Status.FAILED, error="took too long")
        return evaluate(evaluator, request)

    monkeypatch.setattr(SyntheticEvaluator, "evaluate", breaking)
    if split is Split.SELECT:
        with pytest.raises(EvaluationError, match=r"every finalist failed(.|\n)*resume"):
            start(tmp_path / "run")
    else:
        assert start(tmp_path / "run").finished
    monkeypatch.undo()
    state = resume_search(tmp_path / "run")
    assert state.finished
    assert state.evaluations[state.best_id, Split.REPORT].status is Status.OK
    assert (state.n_evaluations[Split.SELECT], state.evaluations.count(Status.FAILED)) == (2, 0)
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    resume_search(tmp_path / "run")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_failed_finalists_are_retried_together_with_an_added_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth finalist must not win just because the other four had failed."""
    evaluate = SyntheticEvaluator.evaluate

    def breaking(evaluator: SyntheticEvaluator, request: EvaluationRequest) -> Evaluation:
        return request.failed("no such device") if request.split is Split.SELECT else evaluate(evaluator, request)

    monkeypatch.setattr(SyntheticEvaluator, "evaluate", breaking)
    with pytest.raises(EvaluationError, match="every finalist failed"):
        start(tmp_path / "run", finals={"finalists": 4})
    monkeypatch.undo()
    state = resume_search(tmp_path / "run", overrides={"finals.finalists": 5})
    assert (state.n_evaluations[Split.SELECT], state.evaluations.count(Status.FAILED)) == (5, 0)
    assert state.best_id == start(tmp_path / "undisturbed", finals={"finalists": 5}).best_id


def test_changed_finals_of_a_finished_run_are_held(tmp_path: Path) -> None:
    """The setting may change on resume, so it must take effect; nothing is evaluated twice, and without a change nothing happens."""
    assert len(start(tmp_path / "run").finalists) == 2
    state = resume_search(tmp_path / "run", overrides=["finals.finalists=5"])
    assert len(state.finalists) == 5
    assert state.finished
    assert state.n_evaluations[Split.SELECT] == 5
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    resume_search(tmp_path / "run")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
