"""What `evomerge watch` and `evomerge doctor` show."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evomerge.build.commands.doctor import Finding, Grade
from evomerge.build.commands.watching import Look, Watcher
from evomerge.cli.console import CONSOLE, number
from evomerge.core import Objective

_SIGN_OF_LIFE_EVERY_S = 0.5
_STYLES = {Grade.GOOD: "green", Grade.NOTE: "yellow", Grade.BAD: "bold red"}


def watch_run(watcher: Watcher, every_s: float, *, once: bool) -> None:
    """Show a run until no process works on it any more or until Ctrl-C; just once if the output is not a terminal."""
    look = watcher.look()
    if once or look.over or not sys.stdout.isatty():
        while not look.sure:
            time.sleep(_SIGN_OF_LIFE_EVERY_S)
            look = watcher.look()
        CONSOLE.print(_shown(look, watcher))
        return
    with Live(_shown(look, watcher), console=CONSOLE, auto_refresh=False) as live:
        while not look.over:
            time.sleep(every_s)
            look = watcher.look()
            live.update(_shown(look, watcher), refresh=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for every finding, and what to do about it."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        table.add_row(Text(finding.grade.value, _STYLES[finding.grade]), finding.subject, finding.found)
        if finding.advice:
            table.add_row("", "", Text(f"-> {finding.advice}", "italic"))
    CONSOLE.print(table)


def _shown(look: Look, watcher: Watcher) -> RenderableType:
    config = watcher.config
    wanted = f" of {look.n_budget}" if look.n_budget else ""
    numbers = [f"{look.n_evaluations}{wanted} evaluations", f"{look.n_pending} pending", f"{look.n_failed} failed"]
    numbers.append(f"{look.n_lost} workers lost")
    times = [f"{_duration(look.elapsed_s)} elapsed"]
    if look.per_minute is not None:
        rate = f"{look.per_minute:,.0f}" if look.per_minute >= 100 else f"{look.per_minute:.3g}"
        times.append(f"lately {rate} per minute")
    if look.remaining_s is not None:
        times.append(f"about {_duration(look.remaining_s)} left")
    lines = [
        Text(f"{config.name or 'search'}, {watcher.strategy}: {look.status}", "bold"),
        Text(", ".join(numbers)),
        Text(", ".join(times)),
    ]
    if look.last_error:
        lines.append(Text(f"last failure: {look.last_error}", "yellow"))
    if not look.best:
        lines.append(Text("no result yet" if look.over else "no result yet: engines take a while to start"))
        return Group(*lines)
    return Group(*lines, _best(look, watcher.objectives))


def _best(look: Look, objectives: Sequence[Objective]) -> Table:
    table = Table()
    table.add_column("best on search", no_wrap=True)
    for objective in objectives:
        table.add_column(objective.name, justify="right", overflow="fold")
    table.add_column("mean", justify="right", overflow="fold")
    for name, scores, mean in look.best:
        table.add_row(name, *(number(score, 4) for score in scores), number(mean, 4))
    return table


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
