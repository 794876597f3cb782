"""What a search prints on the way."""

from pathlib import Path

import pytest

from evomerge.cli.progress import Progress
from evomerge.core import Split
from evomerge.search import RunState, event


def test_tasks_on_which_all_baselines_are_the_same_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("f", "g", "h")
    state = RunState.of(
        [event("run", version=1, objectives=[{"name": n, "direction": "maximize", "reference": None} for n in names])]
    )
    progress = Progress(Path("runs/mine"), 10)
    baselines = ("source:a", "source:b")
    for name in baselines:
        state.apply(event("baseline", id=name, recipe=None, values=None))
    for name, score in zip(baselines, (0.2, 0.3), strict=True):
        state.apply(
            event(
                "evaluated", id=name, split="search", status="ok", scores={"f": 0.0, "g": score, "h": 1.0}, stderr={}, cost={},
                error=None, row=None, checksum=None, elapsed_s=1.0,
            )
        )  # fmt: skip
        progress(state, state.evaluations[name, Split.SEARCH])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "the same score on f (0.000), h (1.000), so" in notes[0]
    assert notes[0].endswith("evomerge eval MODEL -c runs/mine --split search --show 3")


def test_a_failure_is_said_once_by_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    state = RunState.of(
        [
            event("run", version=1, objectives=[{"name": "f", "direction": "maximize", "reference": None}]),
            event("asked", id="c000001", values=[0.5], parents=[], ask_s=0.0),
            event(
                "evaluated", id="c000001", split="search", status="failed", scores={}, stderr={}, cost={}, error="no",
                row=None, checksum=None, elapsed_s=1.0,
            ),
        ]
    )  # fmt: skip
    Progress(Path("run"), 10)(state, state.evaluations["c000001", Split.SEARCH])
    assert capsys.readouterr().out == ""
