"""What a search prints while it runs."""

from pathlib import Path

import pytest

from evomerge.cli import progress as progress_module
from evomerge.cli.progress import Progress, watched
from evomerge.core import Split
from evomerge.search import RunState, event


@pytest.mark.parametrize("together", [False, True])
def test_tasks_on_which_all_baselines_score_the_same_are_named_once(
    capsys: pytest.CaptureFixture[str], together: bool
) -> None:
    """Even if results arrive together: the state then has all of them before the first is announced."""
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
        if not together:
            progress(state, state.evaluations[name, Split.SEARCH])
    for name in baselines if together else ():
        progress(state, state.evaluations[name, Split.SEARCH])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "the same score on f (0.000), h (1.000), so" in notes[0]
    assert notes[0].endswith("evomerge eval MODEL -c runs/mine --split search --show 3")


def test_improvements_and_occasionally_the_pace_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    state = RunState.of(
        [event("run", version=1, objectives=[{"name": "f", "direction": "maximize", "reference": None}])]
    )
    progress = Progress(Path("run"), 10)
    state.apply(event("baseline", id="uniform", recipe=None, values=None))
    names = ["uniform", *(f"c{number:06d}" for number in range(5))]
    for name, score, seconds in zip(names, (0.3, 0.2, 0.5, 0.5, 0.4, 0.45), (1, 1, 6, 8, 9, 6), strict=True):
        if name != "uniform":
            state.apply(event("asked", id=name, values=[0.5], parents=[], ask_s=0.0))
        state.apply(
            event(
                "evaluated", id=name, split="search", status="ok", scores={"f": score}, stderr={}, cost={"dropped_items": 2.0},
                error=None, row=None, checksum=None, elapsed_s=now,
            )
        )  # fmt: skip
        now += seconds
        progress(state, state.evaluations[name, Split.SEARCH])
    note, *lines = capsys.readouterr().out.splitlines()
    assert note == "note: 2 search items also appear in a later split and were dropped (drop_shared)"
    assert [" ".join(line.split()) for line in lines] == [
        "[1/10] uniform mean 0.300 f 0.300",
        "[3/10] c000001 mean 0.500 f 0.500 best so far",
        "[5/10] c000003 mean 0.400 f 0.400 (12/min, best 0.500)",
    ]


def test_with_several_objectives_the_size_of_the_front_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    goals = [{"name": name, "direction": "maximize", "reference": None} for name in "fg"]
    state, progress = RunState.of([event("run", version=1, objectives=goals)]), Progress(Path("run"), 4, 1)
    for number, scores in enumerate([(0.5, 0.5), (0.9, 0.0), (0.1, 0.6), (0.4, 0.4)]):
        name = f"c{number:06d}"
        state.apply(event("asked", id=name, values=[0.5], parents=[], ask_s=0.0))
        state.apply(
            event(
                "evaluated", id=name, split="search", status="ok", scores=dict(zip("fg", scores, strict=True)), stderr={}, cost={},
                error=None, row=None, checksum=None, elapsed_s=now,
            )
        )  # fmt: skip
        now += 11
        progress(state, state.evaluations[name, Split.SEARCH])
        if number == 2:
            again = Progress(Path("run"), 4, 1, known=state)
    again(state, state.evaluations["c000003", Split.SEARCH])
    lines = capsys.readouterr().out.splitlines()
    ends = [line.partition("best 0.500")[2] for line in lines if "/min" in line]
    assert ends == [", front of 2)", *[", front of 3)"] * 3]
    assert [line.partition(";")[0] for line in lines if "finals" in line] == ["search done, front of 3"] * 2


def test_the_finals_are_announced_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    state = RunState.of(
        [
            event("run", version=1, objectives=[{"name": "f", "direction": "maximize", "reference": None}]),
            event("baseline", id="uniform", recipe=None, values=None),
            *(event("asked", id=name, values=[0.5], parents=[], ask_s=0.0) for name in ("c000000", "c000001")),
        ]
    )
    progress = Progress(Path("run"), 3, n_finalists=2)

    def evaluated(name: str, split: Split) -> None:
        state.apply(
            event(
                "evaluated", id=name, split=split.value, status="ok", scores={"f": 0.3}, stderr={}, cost={}, error=None, row=None,
                checksum=None, elapsed_s=1.0,
            )
        )  # fmt: skip

    for name in ("uniform", "c000000", "c000001"):
        evaluated(name, Split.SEARCH)
    for name in ("c000000", "c000001"):  # they arrived together
        progress(state, state.evaluations[name, Split.SEARCH])
    # the winner of earlier finals, as after a raised budget, must not be shown as the state of these finals
    for happened in (
        event("told", ids=["c000000", "c000001"]),
        event("best", id="c000001"),
        event("finalists", ids=["c000000", "uniform"]),
    ):
        state.apply(happened)
    for name in ("uniform", "c000000"):
        evaluated(name, Split.SELECT)
    for name in ("uniform", "c000000"):  # these arrived together too
        progress(state, state.evaluations[name, Split.SELECT])
    state.apply(event("best", id="c000000"))
    evaluated("uniform", Split.REPORT)
    progress(state, state.evaluations["uniform", Split.REPORT])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].endswith("best so far")
    assert lines[1].startswith("search done; finals: the 2 finalists and all baselines are scored on select, then")
    assert [line.partition(" mean")[0] for line in lines[2:]] == [
        "[select 1/2] uniform",
        "[select 2/2] c000000",
        "[report 1/2] uniform",
    ]


def test_a_failure_is_reported_only_by_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_waiting_for_the_first_result_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress_module, "WAITING_AFTER_S", 0.01)
    progress = Progress(tmp_path, 10)
    progress.waiting.start()
    progress.waiting.join(10)
    assert capsys.readouterr().out == "waiting for the first result; engines take a while to start\n"

    monkeypatch.setattr(progress_module, "WAITING_AFTER_S", 3600.0)
    seen: list[Progress] = []

    def fail() -> None:
        with watched(tmp_path, 10) as observer:
            assert isinstance(observer, Progress)
            seen.append(observer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    seen[0].waiting.join(10)
    assert not seen[0].waiting.is_alive(), "the waiting thread was left behind"
