"""Nested MAP (arXiv 2406.07529) for many sources: a tree of two-source problems, each with its own quadratic.

Every coordinate is the weight of one source. First each source is evaluated alone, and every objective is assigned to the
source that is best at it. Then the two nodes with the closest quality on their own objectives are joined: points of the plane
spanned by the two are evaluated, surrogates of both nodes' objectives are fitted there, and the point that they predict
to be best under a preference becomes a node. When one node is left, the next round starts with another preference: the first
weights all objectives equally, later ones are drawn at random. Planes shared with an earlier round are not evaluated again.

A tree over d sources takes (d - 1) planes of `pair_points` results and d results of single sources, whereas one quadratic of all
coordinates has (d + 1)(d + 2) / 2 coefficients. Deviations from the released code: a node's quality is always on the same scale, and
measured instead of predicted once the chosen point is evaluated; and a chosen point is stretched to the cube's surface before
it spans the next plane, so planes never shrink.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from evomerge.core import Json, Objective, random_stream
from evomerge.strategy.base import Floats
from evomerge.strategy.map_bins import draw_where_wrong
from evomerge.strategy.map_front import LinkChoice, Surrogates, as_array
from evomerge.strategy.sampling import SobolStream

Point = tuple[float, ...]

_GRID = 41
_SAME = 1e-9
"""Points that differ by less than this in each coordinate count as equal up to rounding."""
_MAX_SPARE_ROUNDS = 4
"""Number of consecutive rounds without a new point to evaluate, after which the last plane is filled further."""


@dataclass(frozen=True)
class _Node:
    """A point that represents the sources with nonzero weight in it.

    Attributes:
        point: the point itself.
        direction: `point`, scaled so that its largest coordinate is 1.
        objectives: the indices of its own objectives.
        losses: (m,), predicted losses, inf if there is no prediction; measured losses take precedence.
    """

    point: Point
    direction: Point
    objectives: tuple[int, ...]
    losses: Point

    @property
    def sources(self) -> list[Json]:
        return [index for index, value in enumerate(self.direction) if value > 0.0]


@dataclass
class _Plane:
    """Points s * first + t * second, (s, t) in [0, 1]^2, and the (s, t) of those asked so far."""

    first: Point
    second: Point
    stream: SobolStream
    asked: dict[Point, tuple[float, float]] = field(default_factory=dict)

    def point(self, s: float, t: float) -> Point:
        pairs = zip(self.first, self.second, strict=True)
        return tuple(min(s * first + t * second, 1.0) for first, second in pairs)

    def place(self, point: Point) -> tuple[float, float] | None:
        """The (s, t) of a point of the plane; None if it is not in the plane."""
        spanning = np.array([self.first, self.second]).T
        s, t = np.clip(np.linalg.lstsq(spanning, np.array(point), rcond=None)[0], 0.0, 1.0).tolist()
        return (s, t) if np.allclose(self.point(s, t), point, rtol=0.0, atol=_SAME) else None


class NestedPlan:
    """Proposes and learns points of one nested search. Deterministic given the seed and the order of calls."""

    def __init__(
        self,
        dimension: int,
        objectives: tuple[Objective, ...],
        seed: int,
        link: LinkChoice,
        pair_points: int,
        bayesian: bool,
    ) -> None:
        self._objectives = objectives
        self._seed = seed
        self._link: LinkChoice = link
        self._pair_points = pair_points
        self._bayesian = bayesian
        self._leaves = [tuple(row) for row in np.eye(dimension).tolist()]
        self._filler = SobolStream(dimension, random_stream(seed, "map", "design"))
        self._known: dict[Point, Point | None] = {}
        self._open: set[Point] = set()
        self._latest: Point = ()
        self._planes: dict[tuple[Point, Point], _Plane] = {}
        self._nodes: list[_Node] = []
        self._pair: tuple[_Node, _Node] | None = None
        self._round = -1
        self._preference = np.full(len(objectives), 1.0 / len(objectives))
        self._joined: list[Json] = []
        self._joined_before: list[Json] = []

    def propose(self) -> Point:
        """The next point."""
        self._latest = self._next_point()
        self._open.add(self._latest)
        return self._latest

    def adopt(self, point: Point) -> None:
        """Replace the last proposed point by `point`, also in the planes that contain it."""
        self._open.discard(self._latest)
        self._open.add(point)
        for plane in self._planes.values():
            if plane.asked.pop(self._latest, None) is not None:
                place = plane.place(point)
                if place is not None:
                    plane.asked[point] = place
        self._latest = point

    def learn(self, point: Point, losses: Point | None) -> None:
        """Add a result; `losses` is None if it FAILED or was INFEASIBLE."""
        self._open.discard(point)
        self._known[point] = losses

    def diagnostics(self) -> Mapping[str, Json]:
        """The round, its preference, and for each pair in the last finished tree (or in the first, so far) its sources, number of results and leave-one-out R2."""
        preference = dict(zip((goal.name for goal in self._objectives), self._preference.tolist(), strict=True))
        return {"round": self._round, "preference": preference, "pairs": list(self._joined_before or self._joined)}

    def _next_point(self) -> Point:
        for leaf in self._leaves:
            if leaf not in self._known and leaf not in self._open:
                return leaf
        if any(leaf in self._open for leaf in self._leaves):
            return self._filler.next().values
        last_round = self._round + _MAX_SPARE_ROUNDS
        while True:
            if self._pair is None and len(self._nodes) < 2:
                self._begin_round()
            if self._pair is None:
                self._pair = self._closest()
            plane = self._plane(*self._pair)
            n_told = sum(point in self._known for point in plane.asked)
            if n_told < self._pair_points or self._round > last_round:
                return self._in_plane(plane)
            joined = self._join(*self._pair, plane)
            if joined.point not in self._known and joined.point not in self._open:
                return joined.point

    def _begin_round(self) -> None:
        self._round += 1
        self._joined, self._joined_before = [], self._joined
        if self._round:
            generator = random_stream(self._seed, "map", "preference", self._round)
            self._preference = generator.dirichlet(np.ones(len(self._objectives)))
        # objective -> the leaf that is best at it; a leaf that is best at none gets the objective on which it ranks highest
        unknown = (np.inf,) * len(self._objectives)
        goodness = self._goodness(np.array([self._known[leaf] or unknown for leaf in self._leaves]))
        owners = goodness.argmax(axis=0)
        ranks = goodness.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
        self._nodes = []
        for index, leaf in enumerate(self._leaves):
            own = tuple(np.flatnonzero(owners == index).tolist()) or (int(ranks[index].argmax()),)
            self._nodes.append(_Node(leaf, leaf, own, unknown))

    def _goodness(self, losses: Floats) -> Floats:
        """Losses (k, m) scaled per objective: 1 for the best known value, 0 for the worst known one and for unknown ones (inf)."""
        results = [known for known in self._known.values() if known is not None]
        if not results:
            return np.zeros_like(losses)
        worst, best = np.max(results, axis=0), np.min(results, axis=0)
        spread = np.where(worst > best, worst - best, 1.0)
        return np.asarray((worst - np.where(np.isfinite(losses), losses, worst)) / spread)

    def _quality(self, node: _Node) -> float:
        """The mean of a node's own objectives, weighted by the preference."""
        own = list(node.objectives)
        goodness = self._goodness(np.array([self._known.get(node.point) or node.losses]))[0]
        return float(np.average(goodness[own], weights=self._preference[own]))

    def _closest(self) -> tuple[_Node, _Node]:
        qualities = [self._quality(node) for node in self._nodes]
        pairs = [(i, j) for j in range(len(self._nodes)) for i in range(j)]
        first, second = min(pairs, key=lambda pair: abs(qualities[pair[0]] - qualities[pair[1]]))
        return self._nodes[first], self._nodes[second]

    def _plane(self, first: _Node, second: _Node) -> _Plane:
        key = (first.direction, second.direction)
        if key not in self._planes:
            stream = SobolStream(2, random_stream(self._seed, "map", "plane", len(self._planes)))
            plane = self._planes[key] = _Plane(*key, stream)
            # the two nodes are in the plane, and are known or pending
            plane.asked[first.point] = (max(first.point), 0.0)
            plane.asked[second.point] = (0.0, max(second.point))
        return self._planes[key]

    def _results(self, plane: _Plane) -> tuple[Floats, Floats]:
        """(s, t) (n, 2) and losses (n, m) of the plane's finished points."""
        told = [(place, self._known.get(point)) for point, place in plane.asked.items()]
        places = [place for place, losses in told if losses is not None]
        losses = [losses for _, losses in told if losses is not None]
        return as_array(places, 2), as_array(losses, len(self._objectives))

    def _in_plane(self, plane: _Plane) -> Point:
        places, losses = self._results(plane)
        if self._bayesian and len(plane.asked) >= self._pair_points // 2 and len(places) > 1:
            surrogates = Surrogates.fitted(places, losses, self._objectives, self._link)
            pending = [place for point, place in plane.asked.items() if point in self._open]
            generator = random_stream(self._seed, "map", "bayesian", len(self._known) + len(self._open))
            s, t = draw_where_wrong(places, surrogates.relative_errors(), as_array(pending, 2), generator)
        else:
            s, t = plane.stream.next().values
        point = plane.point(s, t)
        plane.asked[point] = (s, t)
        return point

    def _join(self, first: _Node, second: _Node, plane: _Plane) -> _Node:
        """Replace the current pair by the point of its plane that is predicted to be best under the preference."""
        places, losses = self._results(plane)
        own = sorted({*first.objectives, *second.objectives})
        s, t = 0.5, 0.5
        predicted = (np.inf,) * len(self._objectives)
        quality: dict[str, Json] = {}
        if len(places) > 1:
            surrogates = Surrogates.fitted(places, losses, self._objectives, self._link)
            quality = surrogates.quality()
            axis = np.linspace(0.0, 1.0, _GRID)
            grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)[1:]
            expected = surrogates.predict(grid)
            best = int(np.argmax(self._goodness(expected)[:, own] @ self._preference[own]))
            (s, t), predicted = grid[best].tolist(), tuple(expected[best].tolist())
        point = plane.point(s, t)
        plane.asked.setdefault(point, (s, t))
        node = _Node(point, tuple(value / max(point) for value in point), tuple(own), predicted)
        self._nodes = [other for other in self._nodes if other is not first and other is not second] + [node]
        self._pair = None
        self._joined.append(
            {
                "sources": [first.sources, second.sources],
                "results": len(places),
                "loo_r2": {self._objectives[i].name: quality[self._objectives[i].name] for i in own if quality},
            }
        )
        return node
