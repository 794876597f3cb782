"""Tables that are too wide for the terminal: numbers continue on the next line, and names stay whole."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from evomerge.build import open_run, parse_config, start_search
from evomerge.build.commands import planning
from evomerge.build.commands.watching import Watcher
from evomerge.build.problem import make_problem
from evomerge.cli.live import watch_run
from evomerge.cli.tables import print_front, print_plan, print_summary


def test_nothing_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(
        {
            "strategy": "random",
            "evaluation": {"kind": "synthetic", "function": "zdt1", "dimension": 3, "n_items": 10},
            "cluster": {"kind": "local"},
            "budget": {"evaluations": 5},
            "finals": {"finalists": 1},
        },
        folder=tmp_path,
    )
    start_search(config, tmp_path / "run")
    out, run, problem = io.StringIO(), open_run(tmp_path / "run"), make_problem(config)
    for module in ("tables", "live"):
        monkeypatch.setattr(f"evomerge.cli.{module}.CONSOLE", Console(file=out, width=32, soft_wrap=True))
    print_front(run)
    print_summary(run)
    print_plan(planning.sizes(problem), [planning.forecast(problem, planning.same_time(problem, 3600.0), 4, price=1.5)])
    watch_run(Watcher(tmp_path / "run"), 1.0, once=True)
    assert "…" not in out.getvalue()
    assert f"{run.state.best_id} (best)\n  f1: " in out.getvalue(), (
        "scores should follow the name on a line of their own, as a table has no room for them"
    )
