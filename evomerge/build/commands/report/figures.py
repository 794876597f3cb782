"""The plots of the report, as plotly figures. Each function gives None where the run has nothing to show in it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from evomerge.archive import Front
from evomerge.core import Evaluation, Objective, Split
from evomerge.search import Z_95, RunState, front_of, mean_with_error, reference_losses, utility
from evomerge.space import Parameter, SearchSpace

MAX_PARAMETERS = 24
"""So many coordinates fit beside each other; the ones that vary most among the best are shown."""
BEST_SHARE = 0.2
"""The best fifth of the candidates tells which coordinates matter."""
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
    means = [utility(state.objectives, item) for item in evaluations]
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
    groups["front"] = [item for item in evaluations if item.candidate_id in members]
    names = [objective.name for objective in state.objectives]
    figure = go.Figure()
    for kind, items in groups.items():
        text = [item.candidate_id for item in items]
        if len(names) > 2:
            dimensions = [{"label": name, "values": [item.value(name) for item in items]} for name in names]
            half = {"showupperhalf": False, "diagonal": {"visible": False}}
            figure.add_splom(dimensions=dimensions, text=text, name=kind, marker=_marker(kind), **half)
            continue
        bars = {f"error_{axis}": _bars(items, name) for axis, name in zip("xy", names, strict=True) if kind == "front"}
        x, y = ([item.value(name) for item in items] for name in names)
        figure.add_scatter(x=x, y=y, text=text, mode="markers", name=kind, marker=_marker(kind), **bars)
    figure.update_layout(height=180 * len(names) + 240 if len(names) > 2 else 520)
    return _titled(figure, *(_labels(state.objectives) if len(names) == 2 else (None, None)))


def hypervolume(state: RunState) -> go.Figure | None:
    """The hypervolume of the front after each evaluation; None for one objective, or where there is no reference point."""
    reference = reference_losses(state)
    evaluations = list(state.evaluated())
    if len(state.objectives) < 2 or reference is None or not evaluations:
        return None
    front, volumes = Front(state.objectives), [0.0]
    for item in evaluations:
        changed = front.add(item)
        volumes.append(front.hypervolume(np.array(reference)) if changed else volumes[-1])
    figure = go.Figure()
    line = {"color": _COLOURS["front"], "shape": "hv"}
    figure.add_scatter(x=list(range(len(volumes))), y=volumes, mode="lines", line=line)
    return _titled(figure, "candidates", "hypervolume, search split")


def optimism(state: RunState) -> go.Figure | None:
    """Score on the search items, which the search has chosen by, against the score on the report items, which nothing has."""
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
    values = [utility(state.objectives, item) for pair in pairs for item in pair]
    ends = [min(values), max(values)]
    dashes = {"color": "#cccccc", "dash": "dash"}
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line=dashes)
    return _titled(figure, "mean, search split", "mean, report split")


def parameters(state: RunState, space: Sequence[Parameter]) -> go.Figure | None:
    """Parallel coordinates of the candidates, coloured by their mean score; None where candidates are not points."""
    rows, means = [], []
    for item in state.evaluated():
        point = state.entries[item.candidate_id].values
        if point is not None and len(point) == len(space):
            rows.append(point)
            means.append(utility(state.objectives, item))
    if len(rows) < 2:
        return None
    points, scores = np.array(rows), np.array(means)
    telling = _telling(points, scores)
    shown = SearchSpace([space[index] for index in telling])
    values = [shown.decode(row) for row in points[:, telling]]
    dimensions: list[dict[str, Any]] = []
    for one in shown.parameters:
        column: dict[str, Any] = {
            "label": one.name,
            "range": [one.low, one.high],
            "values": [found[one.name] for found in values],
        }
        if one.choices:
            column |= {"tickvals": list(range(len(one.choices))), "ticktext": list(one.choices)}
        dimensions.append(column)
    dimensions.append({"label": "mean", "values": scores.tolist()})
    line = {"color": scores.tolist(), "colorscale": "Viridis", "showscale": True}
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelangle=-20))
    figure.update_layout(**_LAYOUT | {"margin": {"l": 80, "r": 40, "t": 110, "b": 30}, "height": 520})
    return figure


def _telling(points: NDArray[np.float64], scores: NDArray[np.float64]) -> list[int]:
    """At most MAX_PARAMETERS coordinates, in their order: those in which the best candidates agree most, compared with all."""
    if points.shape[1] <= MAX_PARAMETERS:
        return list(range(points.shape[1]))
    best = points[np.argsort(-scores)[: max(2, int(BEST_SHARE * len(scores)))]]
    spread = points.std(axis=0)
    agreement = np.divide(best.std(axis=0), spread, out=np.ones_like(spread), where=spread > 0)
    return sorted(np.argsort(agreement, kind="stable")[:MAX_PARAMETERS].tolist())


def _by_kind(state: RunState, evaluations: Sequence[Evaluation]) -> dict[str, list[int]]:
    """Indices of the sources, of the other baselines, of the candidates, and of the winner of the finals."""
    kinds: dict[str, list[int]] = {}
    for index, item in enumerate(evaluations):
        known = "baseline" if state.entries.is_baseline(item.candidate_id) else "candidate"
        kind = "source" if item.candidate_id.startswith("source:") else known
        kinds.setdefault("winner" if item.candidate_id == state.best_id else kind, []).append(index)
    return kinds


def _marker(kind: str) -> dict[str, Any]:
    if kind == "front":
        return {"color": _COLOURS[kind], "symbol": "circle-open", "size": 13, "line": {"width": 2}}
    if kind == "winner":
        return {"color": _COLOURS[kind], "symbol": "star", "size": 12}
    return {"color": _COLOURS[kind], "size": 6 if kind == "candidate" else 9}


def _bars(items: Sequence[Evaluation], name: str) -> dict[str, Any]:
    return {"array": [Z_95 * item.stderr.get(name, 0.0) for item in items], "thickness": 1, "color": "#cccccc"}


def _labels(objectives: Sequence[Objective]) -> tuple[str, str]:
    first, second = (f"{item.name} ({item.direction.value})" for item in objectives)
    return first, second


def _titled(figure: go.Figure, x: str | None, y: str | None) -> go.Figure:
    height = figure.layout.height
    figure.update_layout(**_LAYOUT | ({"height": height} if height else {}), xaxis_title=x, yaxis_title=y)
    return figure
