"""`front.json`, `front.csv` and `best.yaml` while a run is in progress."""

import json
from pathlib import Path

import pytest
from states import BestWritten, state_of

from evomerge.core import Split
from evomerge.search import FrontFiles, RunDirectory, event
from evomerge.search.front_files import front_json
from evomerge.search.ranking import front_of, pick


def test_best_does_not_depend_on_the_order_of_results(tmp_path: Path) -> None:
    """Scores of a few items are often equal; even in a deterministic run answers come in any order."""
    scores = {"c000001": (0.2, 0.2), "c000002": (0.5, 0.5), "c000003": (0.5, 0.5), "c000004": (0.4, 0.4)}
    state = state_of(scores)
    for order in (list(scores), list(reversed(scores))):
        written = BestWritten()
        files = FrontFiles(RunDirectory(tmp_path), state_of({}), written)
        for name in order:
            files(state, state.evaluations[name, Split.SEARCH])
        files.flush(state)
        assert written.ids[-1] == pick(state, "best").id == "c000002"


def test_outdated_files_of_a_killed_process_are_updated(tmp_path: Path) -> None:
    state = state_of({"c000001": (0.2, 0.2), "c000002": (0.5, 0.5)})
    written = BestWritten()
    files = FrontFiles(RunDirectory(tmp_path), state, written)
    files.flush(state)
    assert written.ids == ["c000002"]
    assert [member["id"] for member in json.loads((tmp_path / "front.json").read_text())["members"]] == ["c000002"]
    files.flush(state)
    assert written.ids == ["c000002"], "the file was written twice"
    state.apply(event("best", id="c000001"))
    files.finish(state)
    assert written.ids[-1] == "c000001", "the winner of the finals was not written"


def test_files_lag_by_at_most_a_second_and_are_not_written_for_every_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    state = state_of({"c000001": (0.2, 0.2), "c000002": (0.5, 0.5), "c000003": (0.6, 0.6)})
    written = BestWritten()
    files = FrontFiles(RunDirectory(tmp_path), state_of({}), written)
    for name, seconds in (("c000001", 0.0), ("c000002", 0.9), ("c000003", 0.2)):
        now += seconds
        files(state, state.evaluations[name, Split.SEARCH])
    assert written.ids == ["c000001", "c000003"]


def test_the_winner_of_the_finals_stays_the_best_until_new_finals(tmp_path: Path) -> None:
    state = state_of({"c000001": (0.2, 0.2), "c000002": (0.5, 0.5)})
    known = state_of({"c000001": (0.2, 0.2)})
    known.apply(event("best", id="c000001"))
    state.apply(event("best", id="c000001"))
    written = BestWritten()
    files = FrontFiles(RunDirectory(tmp_path), known, written)
    files(state, state.evaluations["c000002", Split.SEARCH])
    files.flush(state)
    assert set(written.ids) == {"c000001"} == {pick(state, "best").id}


def test_front_files_contain_no_times_or_paths(tmp_path: Path) -> None:
    content = json.dumps(front_json(state := state_of({"a": (0.5, 0.5)}), front_of(state)))
    assert "elapsed" not in content
    assert "/" not in content
