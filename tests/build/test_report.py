"""The HTML report: it contains what the run holds, loads nothing from elsewhere, and escapes everything from the run."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evomerge.build import open_run, parse_config, resume_search, start_search
from evomerge.build.commands.report import figures, write_report
from evomerge.build.commands.report.figures import MAX_PARAMETERS, parameters
from evomerge.build.commands.report.page import _rows
from evomerge.cli.tables import print_summary
from evomerge.core import ConfigError, EvaluationError, JournalError
from evomerge.evaluation.synthetic import SyntheticEvaluator
from evomerge.space import Parameter


class _Page(HTMLParser):
    """The headings, table cells, and addresses that a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.loaded: list[str] = []
        self.scripts = 0
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.scripts += tag == "script"
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self.headings.append(data.strip())
        elif self._inside in ("td", "th"):
            self.cells.append(data.strip())
        self._inside = "" if data.strip() else self._inside


def _run(folder: Path, **changes: Any) -> Path:
    evaluation = {"kind": "synthetic", "function": "zdt1", "dimension": 5, "n_items": 20, "item_noise": 0.1}
    settings = {
        "strategy": "random",
        "evaluation": evaluation | changes.pop("evaluation", {}),
        "cluster": {"kind": "local", "workers": 1},
        "budget": {"evaluations": 30},
        "finals": {"finalists": 3},
        **changes,
    }
    start_search(parse_config(settings, folder=Path("/")), folder)
    return folder


def test_the_winner_of_the_finals_is_marked(tmp_path: Path) -> None:
    state = open_run(_run(tmp_path / "run")).state
    for figure in (figures.progress(state), figures.fronts(state), figures.optimism(state)):
        assert figure is not None
        assert [list(trace.text) for trace in figure.data if trace.name == "winner"] == [[state.best_id]]


def test_the_whole_run_is_shown_in_one_file(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    path = write_report(run)
    assert path == run / "report.html"
    page = _Page(path)
    wanted = ["report split", "search split", "Progress", "Front", "Hypervolume", "Search against report", "Parameters"]
    assert [part for part in wanted if not any(part in heading for heading in page.headings)] == []
    best = open_run(run).summary()["best_id"]
    assert f"{best} (best)" in page.cells
    members = json.loads((run / "front.json").read_text())["members"]
    assert {member["id"] for member in members} <= set(page.cells)
    assert page.loaded == [], "a report must work without a network"
    again = write_report(run, tmp_path / "elsewhere" / "again.html")
    assert again.read_bytes() == path.read_bytes()


def test_one_objective_and_an_unfinished_run_can_be_reported(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", evaluation={"function": "sphere"}, finals={"finalists": 0}, strategy="cma_es")
    page = _Page(write_report(run))
    assert "Progress" in page.headings
    assert not {"Front", "Hypervolume", "Search against report"} & set(page.headings)
    (run / "journal.jsonl").write_bytes(b"".join((run / "journal.jsonl").read_bytes().splitlines(True)[:10]))
    path = write_report(run)
    assert "not finished" in path.read_text(encoding="utf-8")
    (run / "journal.jsonl").write_bytes(b"".join((run / "journal.jsonl").read_bytes().splitlines(True)[:1]))
    assert _Page(write_report(run)).headings[-2:] == ["Where the time goes", "Versions"], "nothing evaluated yet"


def test_a_run_that_has_continued_since_its_finals_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "run")
    print_summary(open_run(run))
    assert "summary.json" in "".join(capsys.readouterr().out.split())
    n_records = len((run / "journal.jsonl").read_bytes().splitlines())
    n_evaluations = open_run(run).config.budget.evaluations
    resume_search(run, overrides=[f"budget.evaluations={n_evaluations + 5}"])
    (run / "journal.jsonl").write_bytes(
        b"".join((run / "journal.jsonl").read_bytes().splitlines(True)[: n_records + 4])
    )
    text = write_report(run).read_text(encoding="utf-8")
    assert "<p>The winner and scores are those of the last finals" in text
    assert "only search scores so far" not in text
    print_summary(open_run(run))
    shown = "".join(capsys.readouterr().out.split())
    assert "thesearchhascontinuedsince" in shown
    assert "summary.json" not in shown


def test_rows_keep_the_id_that_marks_the_best() -> None:
    summary = {"task_arithmetic:0.5": {"mean": 0.5}, "uniform": {"mean": 0.4}}
    rows = _rows(summary, ["uniform", "task_arithmetic:0.5"], "task_arithmetic:0.5")
    assert [row[:2] for row in rows] == [("uniform", "uniform"), ("task_arithmetic:0.5", "task_arithmetic:0.5 (tuned)")]


def test_three_objectives_are_shown_in_pairs(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", evaluation={"function": "dtlz2"})
    assert '"splom"' in write_report(run).read_text(encoding="utf-8")


def test_reasons_of_failures_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "<script>alert('x')</script> & \"quotes\""

    def fail(self: object, request: object) -> None:
        raise EvaluationError(reason)

    plain = _Page(write_report(_run(tmp_path / "plain", finals={"finalists": 0})))
    monkeypatch.setattr(SyntheticEvaluator, "evaluate", fail)
    run = _run(tmp_path / "failing", budget={"evaluations": 20}, finals={"finalists": 0})
    page = _Page(write_report(run))
    assert any(reason in cell for cell in page.cells)
    assert page.scripts < plain.scripts


def test_many_parameters_are_reduced_to_those_the_best_agree_on(tmp_path: Path) -> None:
    evaluation = {"function": "sphere", "dimension": MAX_PARAMETERS + 6, "item_noise": 0.0}
    run = _run(tmp_path / "run", evaluation=evaluation, finals={"finalists": 0})
    space = [Parameter(f"p{index}", 0.0, 2.0) for index in range(MAX_PARAMETERS + 6)]
    figure = parameters(open_run(run).state, space)
    assert figure is not None
    labels = [dimension.label for dimension in figure.data[0].dimensions]
    assert len(labels) == MAX_PARAMETERS + 1
    assert labels[-1] == "mean"
    assert labels[:-1] == sorted(labels[:-1], key=lambda label: int(label[1:]))


def test_choices_are_shown_by_name(tmp_path: Path) -> None:
    evaluation = {"function": "sphere", "dimension": 2}
    state = open_run(_run(tmp_path / "run", evaluation=evaluation, finals={"finalists": 0})).state
    figure = parameters(state, [Parameter.categorical("layer", ("skip", "a", "b")), Parameter("weight", -1.0, 1.0)])
    assert figure is not None
    layer, weight, _ = figure.data[0].dimensions
    points = [entry.values for entry in state.proposed]
    assert set(layer.values) == {0.0, 1.0, 2.0}
    assert list(layer.values) == [float(int(3 * point[0])) for point in points if point is not None]
    assert (list(layer.tickvals), list(layer.ticktext)) == ([0, 1, 2], ["skip", "a", "b"])
    assert list(weight.values) == pytest.approx([2 * point[1] - 1 for point in points if point is not None])


def test_a_missing_run_and_an_unwritable_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        write_report(tmp_path / "nothing")
    run = _run(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(run, run / "config.yaml" / "report.html")
