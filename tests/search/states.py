"""Run states built by hand for tests, and a stand-in for writing `best.yaml`."""

from evomerge.core import Split
from evomerge.search import Entry, RunState, event

Scores = dict[str, tuple[float, float] | None]


def state_of(search: Scores, select: Scores | None = None) -> RunState:
    """A state with these (f, g) scores; None means failed."""
    goals = [{"name": name, "direction": "maximize", "reference": None} for name in ("f", "g")]
    events = [event("run", version=1, objectives=goals)]
    events += [event("asked", id=name, values=[0.5], parents=[], ask_s=0.0) for name in search]
    for split, scores in ((Split.SEARCH, search), (Split.SELECT, select or {})):
        for name, pair in scores.items():
            events.append(
                event(
                    "evaluated", id=name, split=split.value, status="failed" if pair is None else "ok",
                    scores={} if pair is None else {"f": pair[0], "g": pair[1]}, stderr={}, cost={"items": 10},
                    error=None, row=None, checksum=None, elapsed_s=1.0,
                )
            )  # fmt: skip
    return RunState.of(events)


class BestWritten:
    """Records the candidates that `best.yaml` was written for."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def __call__(self, entry: Entry) -> None:
        self.ids.append(entry.id)
