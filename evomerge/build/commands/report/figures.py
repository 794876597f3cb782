"""The plots of the report, as plotly figures. Each function returns None if the run has no data for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from evomerge.archive import Front
from evomerge.core import Evaluation, Objective, Split, model_of_baseline
from evomerge.search import Z_95, RunState, front_of, mean_with_error, reference_losses, utility
from evomerge.space import Parameter, SearchSpace

MAX_PARAMETERS = 24
"""This many coordinates fit side by side; shown are those that the best candidates agree on most."""
BEST_SHARE = 0.2
"""The best fifth of the candidates decides which coordinates these are."""
_COLOURS = {"source": "#d95f02", "baseline": "#7570b3", "candidate": "#9aa5b1", "front": "#1b9e77", "winner": "#1c2733"}
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "height": 420,
    "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
    "legend": {"orientation": "h", "y": 1.08},
}


def progress(state: RunState) -> go.Figure | None:
    """Mean score of every evaluation on the search split in the order of the candidates, and the best so far."""
    evaluations = list(state.evaluated())
    if not evaluations:
        return None
    means = [utility(state.objectives, evaluation) for evaluation in evaluations]
    figure = go.Figure()
    for kind, wanted in _by_kind(state, evaluations).items():
        figure.add_scatter(
            x=[index + 1 for index in wanted],
            y=[means[index] for index in wanted],
            text=[evaluations[index].candidate_id for index in wanted],
            mode="markers", name=kind, marker=_marker(kind),
        )  # fmt: skip
    best = np.maximum.accumulate(means)
    line = {"color": _COLOURS["front"], "shape": "hv"}
    figure.add_scatter(x=list(range(1, len(best) + 1)), y=best.tolist(), mode="lines", name="best so far", line=line)
    return _titled(figure, "candidate", "mean of the objectives, search split")


def fronts(state: RunState) -> go.Figure | None:
    """All evaluations against each pair of objectives, the non-dominated ones marked; two objectives with intervals."""
    evaluations = list(state.evaluated())
    if len(state.objectives) < 2 or not evaluations:
        return None
    members = front_of(state)
    groups = {kind: [evaluations[i] for i in wanted] for kind, wanted in _by_kind(state, evaluations).items()}
    groups["front"] = [evaluation for evaluation in evaluations if evaluation.candidate_id in members]
    names = [objective.name for objective in state.objectives]
    figure = go.Figure()
    for kind, group in groups.items():
        text = [evaluation.candidate_id for evaluation in group]
        if len(names) > 2:
            dimensions = [{"label": name, "values": [evaluation.value(name) for evaluation in group]} for name in names]
            half = {"showupperhalf": False, "diagonal": {"visible": False}}
            figure.add_splom(dimensions=dimensions, text=text, name=kind, marker=_marker(kind), **half)
            continue
        bars = {f"error_{axis}": _bars(group, name) for axis, name in zip("xy", names, strict=True) if kind == "front"}
        x, y = ([evaluation.value(name) for evaluation in group] for name in names)
        figure.add_scatter(x=x, y=y, text=text, mode="markers", name=kind, marker=_marker(kind), **bars)
    figure.update_layout(height=180 * len(names) + 240 if len(names) > 2 else 520)
    return _titled(figure, *(_labels(state.objectives) if len(names) == 2 else (None, None)))


def hypervolume(state: RunState) -> go.Figure | None:
    """The hypervolume of the front after each evaluation; None for one objective, or without a reference point."""
    reference = reference_losses(state)
    evaluations = list(state.evaluated())
    if len(state.objectives) < 2 or reference is None or not evaluations:
        return None
    front, volumes = Front(state.objectives), [0.0]
    for evaluation in evaluations:
        changed = front.add(evaluation)
        volumes.append(front.hypervolume(np.array(reference)) if changed else volumes[-1])
    figure = go.Figure()
    line = {"color": _COLOURS["front"], "shape": "hv"}
    figure.add_scatter(x=list(range(len(volumes))), y=volumes, mode="lines", line=line)
    return _titled(figure, "candidates", "hypervolume, search split")


def optimism(state: RunState) -> go.Figure | None:
    """Score on the search items, which guided the search, against the score on the report items, which did not."""
    pairs = []
    for search in state.evaluated():
        report = state.evaluations.get((search.candidate_id, Split.REPORT))
        if report is not None and report.scores:
            pairs.append((search, report))
    if not pairs:
        return None
    figure = go.Figure()
    for kind, wanted in _by_kind(state, [search for search, _ in pairs]).items():
        x, y = (
            np.array([mean_with_error(state.objectives, pairs[index][side]) for index in wanted]) for side in (0, 1)
        )
        figure.add_scatter(
            x=x[:, 0].tolist(), y=y[:, 0].tolist(), mode="markers", name="finalist" if kind == "candidate" else kind,
            text=[pairs[index][0].candidate_id for index in wanted],
            error_x={"array": (Z_95 * x[:, 1]).tolist(), "thickness": 1},
            error_y={"array": (Z_95 * y[:, 1]).tolist(), "thickness": 1},
            marker=_marker(kind),
        )  # fmt: skip
    values = [utility(state.objectives, evaluation) for pair in pairs for evaluation in pair]
    ends = [min(values), max(values)]
    dashes = {"color": "#cccccc", "dash": "dash"}
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line=dashes)
    return _titled(figure, "mean, search split", "mean, report split")


def parameters(state: RunState, space: Sequence[Parameter]) -> go.Figure | None:
    """Parallel coordinates of the candidates, coloured by their mean score; None where candidates are not points."""
    rows, means = [], []
    for evaluation in state.evaluated():
        point = state.entries[evaluation.candidate_id].values
        if point is not None and len(point) == len(space):
            rows.append(point)
            means.append(utility(state.objectives, evaluation))
    if len(rows) < 2:
        return None
    points, scores = np.array(rows), np.array(means)
    informative = _most_agreed(points, scores)
    shown = SearchSpace([space[index] for index in informative])
    values = [shown.decode(row) for row in points[:, informative]]
    dimensions: list[dict[str, Any]] = []
    for parameter in shown.parameters:
        column: dict[str, Any] = {
            "label": parameter.name,
            "range": [parameter.low, parameter.high],
            "values": [point[parameter.name] for point in values],
        }
        if parameter.choices:
            column |= {"tickvals": list(range(len(parameter.choices))), "ticktext": list(parameter.choices)}
        dimensions.append(column)
    dimensions.append({"label": "mean", "values": scores.tolist()})
    line = {"color": scores.tolist(), "colorscale": "Viridis", "showscale": True}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelangle=-20))
    figure.update_layout(**_LAYOUT | {"margin": {"l": 80, "r": 40, "t": 110, "b": 30}, "height": 520})
    return figure


def _most_agreed(points: NDArray[np.float64], scores: NDArray[np.float64]) -> list[int]:
    """At most MAX_PARAMETERS coordinates, in order: those that the best candidates agree on most, relative to all candidates."""
    if points.shape[1] <= MAX_PARAMETERS:
        return list(range(points.shape[1]))
    best = points[np.argsort(-scores)[: max(2, int(BEST_SHARE * len(scores)))]]
    spread = points.std(axis=0)
    agreement = np.divide(best.std(axis=0), spread, out=np.ones_like(spread), where=spread > 0)
    return sorted(np.argsort(agreement, kind="stable")[:MAX_PARAMETERS].tolist())


def _by_kind(state: RunState, evaluations: Sequence[Evaluation]) -> dict[str, list[int]]:
    """Indices of the evaluations of sources, other baselines, candidates, and the winner of the finals."""
    kinds: dict[str, list[int]] = {}
    for index, evaluation in enumerate(evaluations):
        name = evaluation.candidate_id
        kind = "baseline" if state.entries.is_baseline(name) else "candidate"
        kind = "source" if model_of_baseline(name) else kind
        kinds.setdefault("winner" if name == state.best_id else kind, []).append(index)
    return kinds


def _marker(kind: str) -> dict[str, Any]:
    if kind == "front":
        return {"color": _COLOURS[kind], "symbol": "circle-open", "size": 13, "line": {"width": 2}}
    if kind == "winner":
        return {"color": _COLOURS[kind], "symbol": "star", "size": 12}
    return {"color": _COLOURS[kind], "size": 6 if kind == "candidate" else 9}


def _bars(evaluations: Sequence[Evaluation], name: str) -> dict[str, Any]:
    errors = [Z_95 * evaluation.stderr.get(name, 0.0) for evaluation in evaluations]
    return {"array": errors, "thickness": 1, "color": "#cccccc"}


def _labels(objectives: Sequence[Objective]) -> tuple[str, str]:
    first, second = (f"{objective.name} ({objective.direction.value})" for objective in objectives)
    return first, second


def _titled(figure: go.Figure, x: str | None, y: str | None) -> go.Figure:
    height = figure.layout.height
    figure.update_layout(**_LAYOUT | ({"height": height} if height else {}), xaxis_title=x, yaxis_title=y)
    return figure
