"""Tables on the terminal. Every number comes from `Run.summary`, `Run.front` or an evaluation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from evomerge.build import Run
from evomerge.build.commands.planning import Forecast, Sizes
from evomerge.build.commands.reading import outcome
from evomerge.cli.console import CONSOLE, number
from evomerge.config import LmEvalConfig, SearchConfig
from evomerge.core import Evaluation, Objective, Split, Status, cost_key
from evomerge.search import (
    Z_95,
    Comparison,
    Row,
    RunState,
    best_of_front,
    headline,
    items_of_candidate,
    leader,
    remarks_on_finals,
    verdict,
)

if TYPE_CHECKING:
    from evomerge.evaluation.shown_items import ShownItem

_MIN_SCORE_WIDTH = 7
"""of columns of scores in narrow terminals: half of "0.123 ± 0.045" """

MAX_PROMPT = 400
"""how many characters of a prompt are shown, counted from its end"""


def print_summary(run: Run) -> None:
    """Print scores of sources, uniform average, tuned task arithmetic and the best recipe, per objective and mean, on the search and report splits."""
    summary = run.summary()
    objectives = run.state.objectives
    names, tuned = headline(run.state, summary["details"]["search"])
    best = leader(run.state)
    mark = "best" if run.state.best_id else "best on search"
    if best is not None and (method := run.chosen_methods([best]).get(best)):
        mark += f", {method}"
    for split in (Split.SEARCH, Split.REPORT):
        details = summary["details"][split.value]
        if any(name in details for name in names):
            count = items_of_candidate(run.state, split)
            title = f"{split} split, {f'{count:,} items, ' if count else ''}± 95% interval"
            _print_scores(title, names, details, objectives, tuned, best, mark)
    if not run.state.n_evaluations[Split.SEARCH]:
        CONSOLE.print("no candidate has been evaluated yet")
    _print_comparisons(summary["comparisons"], names)
    _print_failures(run.state, names)
    for remark in remarks_on_finals(run.state):
        CONSOLE.print(remark)
    _print_surrogates(summary["strategy"])
    _print_archives(summary["strategy"])
    _print_overhead(summary["overhead"])
    folder = run.directory
    files = [("best recipe", folder.best), ("front", folder.front_json)]
    if outcome(run.state, run.config) is not None:  # otherwise the file is from before the run was resumed
        files.append(("summary", folder.summary))
    for label, path in files:
        if path.exists():
            CONSOLE.print(f"{label + ':':<14}{path}")


def print_front(run: Run) -> None:
    """Print the members of the front, best mean first."""
    objectives = run.state.objectives
    if not run.state.n_evaluations[Split.SEARCH]:
        CONSOLE.print("no candidate has been evaluated yet")
        return
    count = items_of_candidate(run.state, Split.SEARCH)
    evaluations = f"{run.state.n_evaluations[Split.SEARCH]} evaluations" + (f" of {count:,} items" if count else "")
    table = Table(title=f"front on the search split ({evaluations}), best mean first", title_justify="left")
    members = best_of_front(run.state)
    methods = run.chosen_methods([member.candidate_id for member in members])
    table.add_column("id", no_wrap=True)
    if methods:
        table.add_column("method")
    for objective in objectives:
        table.add_column(f"{objective.name} ({objective.direction.value})", justify="right", overflow="fold")
    for member in members:
        errors = [member.stderr.get(objective.name) for objective in objectives]
        values = [member.value(objective.name) for objective in objectives]
        cells = [_with_interval(value, error, 4) for value, error in zip(values, errors, strict=True)]
        table.add_row(member.candidate_id, *([methods[member.candidate_id]] if methods else []), *cells)
    CONSOLE.print(table)
    volume = run.front()["hypervolume"]
    if volume is not None:
        CONSOLE.print(f"hypervolume {volume:.6g}")


def print_plan(sizes: Sizes, forecasts: Sequence[Forecast]) -> None:
    """Print the sizes of a search, and a forecast for each number of workers."""
    CONSOLE.print(f"space       {sizes.dimension} dimensions, {sizes.n_objectives} objectives")
    if sizes.candidate_bytes:
        known = f"{sizes.rank_bytes / 1e9:.3g} GB ranks, " if sizes.rank_bytes else ""
        if sizes.statistics_bytes:
            known += f"at most about {sizes.statistics_bytes / 1e9:.2g} GB histograms, or masks and norms, "
        CONSOLE.print(
            f"worker      {sizes.worker_bytes / 1e9:.3g} GB: {sizes.source_bytes / 1e9:.3g} GB source models, {known}"
            f"{sizes.engine_bytes / 1e9:.3g} GB engine; plus its caches"
        )
    CONSOLE.print(f"candidate   {sizes.journal_bytes / 1e3:.2g} kB on disk, plus 4 bytes per item scored")
    if not forecasts:
        return
    table = Table("workers", "evaluations incl. finals", "hours", "busy", "worker hours", "cost")
    for column in table.columns:
        column.justify, column.overflow = "right", "fold"
    for forecast in forecasts:
        table.add_row(
            str(forecast.workers),
            str(forecast.evaluations),
            f"{forecast.wall_s / 3600:.3g}",
            f"{forecast.utilisation:.0%}",
            f"{forecast.workers * forecast.wall_s / 3600:.3g}",
            "" if forecast.cost is None else f"{forecast.cost:.2f}",
        )
    CONSOLE.print(table)


def print_evaluation(name: str, evaluation: Evaluation, config: SearchConfig) -> None:
    """Print the scores of one model with 95% intervals."""
    table = Table(title=f"{name}, {evaluation.split} split", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("score", justify="right")
    table.add_column("items", justify="right")
    for task, score in evaluation.scores.items():
        interval = _with_interval(score, evaluation.stderr[task], 4)
        table.add_row(task, interval, str(len(evaluation.item_scores[task])))
    for objective in config.objectives:
        cost = evaluation.cost.get(cost_key(objective.name) or "")
        if cost is not None:
            table.add_row(objective.name, f"{cost:,.0f}" if float(cost).is_integer() else f"{cost:,.3f}", "")
    CONSOLE.print(table)
    drawn = config.evaluation.search_items if isinstance(config.evaluation, LmEvalConfig) else None
    if drawn is not None and evaluation.split is Split.SEARCH:
        CONSOLE.print(
            f"evaluation.search_items is {drawn}: only the items that a search scores its candidates on were used. To score all items of the split, "
            "add --set evaluation.search_items=null"
        )


def print_items(shown: Mapping[str, Sequence["ShownItem"]], evaluation: Evaluation) -> None:
    """Print items with prompt, answers and target as Python string literals, so that spaces and line ends are visible."""
    for task, items in shown.items():
        for item in items:
            CONSOLE.print(f"\n{task}, item {item.number}: score {evaluation.item_scores[task][item.number]:g}")
            prompt = item.prompt if len(item.prompt) <= MAX_PROMPT else f"[...]{item.prompt[-MAX_PROMPT:]}"
            CONSOLE.print(f"  prompt  {prompt!r}")
            for answer in item.answers:
                CONSOLE.print(f"  answer  {answer!r}" if len(item.answers) == 1 else f"  choice  {answer}")
            if item.target is not None:
                CONSOLE.print(f"  target  {item.target!r}")


def _print_scores(
    title: str,
    names: list[str],
    details: Mapping[str, Row],
    objectives: tuple[Objective, ...],
    tuned: str | None,
    best: str | None,
    mark: str,
) -> None:
    """Print the scores of one split as a table, or line by line where the terminal is too narrow for it."""
    headings = [*(objective.name for objective in objectives), "mean"]
    rows: dict[str, list[str]] = {}
    for name in names:
        if name not in details:
            continue
        row = details[name]
        scores, errors = row["scores"], row["stderr"]
        label = (f"{name} (tuned)" if name == tuned else name) + (f" ({mark})" if name == best else "")
        rows[label] = [
            *(_with_interval(scores[objective.name], errors.get(objective.name), 3) for objective in objectives),
            _with_interval(row["mean"], row["mean_stderr"], 3),
        ]
    if max(map(len, rows)) + 3 + len(headings) * (_MIN_SCORE_WIDTH + 3) > CONSOLE.width:
        CONSOLE.print(title)
        for label, cells in rows.items():
            CONSOLE.print(label)
            for heading, cell in zip(headings, cells, strict=True):
                CONSOLE.print(f"  {heading}: {cell}")
        return
    table = Table(title=title, title_justify="left")
    table.add_column("recipe", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold", min_width=_MIN_SCORE_WIDTH)
    for label, cells in rows.items():
        table.add_row(label, *cells, style="bold" if label.endswith(f"({mark})") else None)
    CONSOLE.print(table)


def _print_comparisons(comparisons: Mapping[str, Comparison], names: Sequence[str]) -> None:
    shown = {name: row for name, row in comparisons.items() if name in names}
    if shown:
        CONSOLE.print("best minus baseline on the report split, paired by item (95% interval):")
    for name, row in shown.items():
        difference, low, high = (number(value, 3, "+") for value in (row["difference"], row["low"], row["high"]))
        CONSOLE.print(f"  {name:<22}  {difference}  [{low}, {high}]  {verdict(row)}")


def _print_failures(state: RunState, names: Sequence[str]) -> None:
    """The rows that tables lack because their evaluation failed, and the number of all failures."""
    for split in (Split.SEARCH, Split.REPORT):
        for name in names:
            evaluation = state.evaluations.get((name, split))
            if evaluation is not None and evaluation.status is not Status.OK:
                CONSOLE.print(f"{name} failed on the {split} split and has no score there: {evaluation.error}")
                if name == state.best_id:
                    CONSOLE.print("resume the run to try it again")
    n_failed = state.evaluations.count(Status.FAILED)
    if n_failed:
        count = "1 evaluation" if n_failed == 1 else f"{n_failed} evaluations"
        CONSOLE.print(f"{count} of {len(state.evaluations)} failed; `evomerge report` lists them")


def _print_surrogates(diagnostics: Mapping[str, Any]) -> None:
    """Print how well the strategy's surrogate models predict unseen results, if it reports that."""
    for row in [diagnostics, *diagnostics.get("pairs", [])]:
        if row.get("loo_r2"):
            quality = ", ".join(f"{name} {value:.2f}" for name, value in row["loo_r2"].items())
            where = f" (sources {' + '.join(map(str, row['sources']))})" if "sources" in row else ""
            CONSOLE.print(f"surrogate fit, leave-one-out R2{where}: {quality}")


def _print_archives(diagnostics: Mapping[str, Any]) -> None:
    """Print how full the archives of a strategy are, if it keeps any."""
    for name, row in diagnostics.get("archives", {}).items():
        CONSOLE.print(
            f"archive of {name}: {row['elites']} of {row['cells']} cells filled, QD score {row['qd_score']:.2f}, best {row['best']}"
        )


def _print_overhead(row: Mapping[str, float]) -> None:
    if not row:
        return
    parts = ", ".join(
        f"{name.removesuffix('_s')} {1000 * value:.1f}"
        for name, value in row.items()
        if name.endswith("_s") and not name.endswith("candidate_s")
    )
    CONSOLE.print(
        f"time per candidate: {row['candidate_s']:.3f} s, slowest {row['slowest_candidate_s']:.3f} s (ms: {parts}); "
        f"{100 * row['share']:.1f}% outside engine and scoring"
    )


def _with_interval(value: float, error: float | None, digits: int) -> str:
    """A value ± half its 95% interval; just the value if its standard error is unknown."""
    return number(value, digits) + ("" if error is None else f" ± {number(Z_95 * error, digits)}")
