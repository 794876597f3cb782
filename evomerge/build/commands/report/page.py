"""Renders the report's page from a run. Numbers come from the same summary as the tables on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from evomerge.build.commands.reading import Run, open_run, outcome
from evomerge.build.commands.report import figures
from evomerge.core import ConfigError, EvomergeError, FilePath, Split, Status, atomic_write_text
from evomerge.recipe import recipe_to_yaml
from evomerge.search import Z_95, Row, best_of_front, headline, items_of_candidate, leader, remarks_on_finals, verdict

MAX_ROWS = 50
"""maximum number of rows in the tables of the front and of failures"""


def write_report(folder: FilePath, out: FilePath | None = None) -> Path:
    """Write the report of a live or finished run: one self-contained HTML file, which needs no network.

    Args:
        folder: the run directory.
        out: the file; default `report.html` in the run directory.

    Returns:
        The file.

    Raises:
        JournalError: `folder` is not a run directory, or the run is damaged.
        ConfigError: the file cannot be written.
    """
    run = open_run(folder)
    path = Path(out) if out else Path(folder) / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, _page(run, Path(folder).resolve().name))
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written: {problem.strerror}; choose another file (--out)") from None
    return path


def _page(run: Run, name: str) -> str:
    environment = Environment(
        loader=PackageLoader("evomerge.build.commands", "report"), autoescape=True, undefined=StrictUndefined
    )
    state, resolved = run.state, run.directory.read_resolved()
    summary = run.summary()
    shown, tuned = headline(state, summary["details"]["search"])
    members = best_of_front(state)[:MAX_ROWS]
    plots = {
        "progress": figures.progress(state),
        "front": figures.fronts(state),
        "hypervolume": figures.hypervolume(state),
        "optimism": figures.optimism(state),
        "parameters": figures.parameters(state, run.space.parameters),
    }
    return environment.get_template("report.html.j2").render(
        name=name,
        status=_status(run),
        run=state.run,
        summary=summary,
        objectives=state.objectives,
        tables=[(split, _rows(summary["details"][split], shown, tuned)) for split in ("report", "search")],
        remarks=remarks_on_finals(state),
        comparisons=[(name, row, verdict(row)) for name, row in summary["comparisons"].items() if name in shown],
        members=members,
        methods=run.chosen_methods([member.candidate_id for member in members]),
        failures=_failures(run),
        max_rows=MAX_ROWS,
        n_items={split.value: items_of_candidate(state, split) for split in Split},
        best=leader(state),
        recipe=_recipe(run),
        versions=resolved.versions,
        checkout=resolved.checkout,
        plots={key: _html(key, figure) for key, figure in plots.items() if figure is not None},
        plotly=get_plotlyjs(),
        z=Z_95,
    )


def _html(name: str, figure: go.Figure) -> str:
    options = {"displaylogo": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{name}", config=options))


def _status(run: Run) -> str:
    ended = outcome(run.state, run.config)
    if ended is not None:
        return ended
    if run.state.best_id is not None:
        return "not finished" if run.state.search_continued else "not finished: the finals are not complete"
    return "not finished: only search scores so far, which are biased upwards for the best"


def _rows(details: Mapping[str, Row], shown: Sequence[str], tuned: str | None) -> list[tuple[str, str, Row]]:
    """(id, label, numbers) of the rows of a table."""
    return [(name, f"{name} (tuned)" if name == tuned else name, details[name]) for name in shown if name in details]


def _failures(run: Run) -> list[tuple[str, str, str]]:
    """(candidate, split, reason) of the last failed evaluations."""
    state = run.state
    rows = [
        (name, split.value, state.evaluations[name, split].error or "")
        for split in Split
        for name in state.entries
        if state.evaluations.status(name, split) is Status.FAILED
    ]
    return rows[-MAX_ROWS:]


def _recipe(run: Run) -> tuple[str, str] | None:
    """The best candidate and its recipe; None if nothing has been evaluated or candidates have no recipes.

    If the models are needed but missing, the recipe is read from the file that the run wrote.
    """
    best = leader(run.state)
    if best is None:
        return None
    try:
        recipe = run.recipe(run.state.entries[best])
        text = None if recipe is None else recipe_to_yaml(recipe)
    except EvomergeError:
        text = run.directory.best.read_text(encoding="utf-8") if run.directory.best.exists() else None
    return None if text is None else (best, text)
