"""`map`: amortised Pareto fronts from quadratic surrogates (MAP, arXiv 2406.07529), one proposal at a time.

After an initial design, every proposal is the point of the surrogates' Pareto front with the most hypervolume beyond their own
predictions for the evaluated points, so that errors of the fit at neighbouring points cancel out. Deviations from the paper: the surrogate's
fit is ridge-regularised (see `quadratic_model`) and repeated after every result instead of once, the front is searched inside the sampled
box and not on [-3, 3]^d, and chosen points are actually evaluated. `bayesian` and `nested` are the paper's variants; see `map_bins`
and `map_nested`.
"""

from array import array
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from evomerge.core import Candidate, ConfigError, Genome, Json, Objective, VectorGenome, random_stream
from evomerge.space import placed
from evomerge.strategy.base import Floats, Proposal, StrategyOptions, Told
from evomerge.strategy.map_bins import MAX_BINNED_DIMENSION, draw_where_wrong
from evomerge.strategy.map_front import LinkChoice, Surrogates, as_array, most_promising, predicted_front
from evomerge.strategy.map_nested import NestedPlan
from evomerge.strategy.quadratic_model import n_coefficients
from evomerge.strategy.replay import ReplayStrategy
from evomerge.strategy.ruin import tamed
from evomerge.strategy.sampling import SobolStream

_MOST_COEFFICIENTS = 861
"""Those of a full quadratic in 40 dimensions; more cannot be learned within this strategy's intended budgets."""
_MAX_FULL_DIMENSION = 12
"""A diagonal model was better from 13 dimensions on after 200 evaluations, and from 12 on after 100."""
_MAX_CAUTION = 1024.0
"""see `predicted_front`; doubles with every failure until a success"""


def default_design(dimension: int) -> int:
    """How many results the default options wait for before they use the surrogates."""
    return _design(dimension, diagonal=dimension > _MAX_FULL_DIMENSION)


def _design(dimension: int, *, diagonal: bool) -> int:
    return max(n_coefficients(dimension, diagonal=diagonal) // 2, 2 * dimension + 2)


class MapOptions(StrategyOptions):
    """Options of `map`."""

    n_initial: int | None = Field(
        None,
        ge=2,
        description="points of the design, including seeds; None: one per two coefficients, at least 2 d + 2",
    )
    link: LinkChoice = Field(
        "auto",
        description="link from the quadratic to the score; auto: logit for scores in [0, 1], alternating softplus and identity for other "
        "scores above 0 (neither is better on all problems), else identity",
    )
    model: Literal["auto", "quadratic", "diagonal"] = Field(
        "auto",
        description="quadratic: with all products of two coordinates; diagonal: with squares only, for many dimensions; "
        f"auto: quadratic up to {_MAX_FULL_DIMENSION} dimensions, else diagonal; not used with `nested`",
    )
    bayesian: bool = Field(
        False,
        description="place the second half of the design where the surrogates have the largest errors, by bins of the direction "
        f"(the paper's Bayesian MAP); up to {MAX_BINNED_DIMENSION} dimensions, or in each pair's plane with `nested`",
    )
    nested: bool = Field(
        False,
        description="join the sources in pairs in a tree (the paper's nested MAP, for many sources); "
        "each coordinate must be the weight of one source, `n_initial` is not used",
    )
    pair_points: int = Field(
        20, ge=6, description="nested: results in the plane of two nodes before they are joined (paper: 20)"
    )


class MapSurrogate(ReplayStrategy):
    """Quadratic surrogates and their Pareto front.

    FAILED and INFEASIBLE candidates are left out of the fits; points closer to one of these than to a successful one are not proposed, except by the
    design, of which every second failure counts as a point. Pending ones are used with their predicted losses. Seeds are part of the design. `diagnostics` gives the leave-one-out R2 of every surrogate: if it is
    far below 1, a quadratic does not describe the scores, and another strategy will do better.
    """

    name: ClassVar[str] = "map"
    options_type: ClassVar[type[StrategyOptions]] = MapOptions
    options: MapOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = self.options
        diagonal = options.model == "diagonal" or (options.model == "auto" and self.dimension > _MAX_FULL_DIMENSION)
        self._check_dimension(n_coefficients(self.dimension, diagonal=diagonal))
        self._plan = (
            NestedPlan(
                self.dimension, self.objectives, self.random_seed, options.link, options.pair_points, options.bayesian
            )
            if options.nested
            else _FlatPlan(self.choices, self.objectives, self.random_seed, options, diagonal=diagonal)
        )

    def diagnostics(self) -> Mapping[str, Json]:
        """`loo_r2` by objective, from the second result on; with `nested`, `round`, `preference` and `pairs`."""
        return self._plan.diagnostics()

    def _propose(self) -> Proposal:
        proposal = Proposal(VectorGenome(self._plan.propose()))
        # with `nested`, surrogates are fitted in a plane, so points must not be replaced by arbitrary ones
        return proposal if self.options.nested else self._unknown_instead(proposal)

    def _learn(self, told: Told) -> None:
        self._plan.learn(told.candidate.point, told.losses)

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:
        self._plan.adopt(recorded.point)

    def _check_dimension(self, coefficients: int) -> None:
        options, dimension = self.options, self.dimension
        if options.nested and dimension < 2:
            raise ConfigError("strategy map: nested joins sources in pairs, but the space has only one dimension")
        if options.nested and any(self.choices):
            raise ConfigError(
                "strategy map: nested needs a space of one weight per source, but the space has categorical parameters"
            )
        if not options.nested and coefficients > _MOST_COEFFICIENTS:
            raise ConfigError(
                f"strategy map: {dimension} dimensions need {coefficients} coefficients per objective; "
                f"it takes at most {_MOST_COEFFICIENTS}. Use model: diagonal, nested: true if each coordinate is one source's weight, fewer "
                "layer groups, or the strategy cma_es or nsga2"
            )
        if options.bayesian and not options.nested and not 2 <= dimension <= MAX_BINNED_DIMENSION:
            raise ConfigError(
                f"strategy map: bayesian takes 2 to {MAX_BINNED_DIMENSION} dimensions, but the space has {dimension}; leave it "
                "out, or add nested: true if each coordinate is one source's weight"
            )


class _FlatPlan:
    """MAP with one quadratic of all coordinates per objective."""

    def __init__(
        self,
        choices: tuple[int, ...],
        objectives: tuple[Objective, ...],
        seed: int,
        options: MapOptions,
        *,
        diagonal: bool,
    ) -> None:
        self._choices = np.array(choices)
        self._dimension = dimension = len(choices)
        self._objectives = objectives
        self._seed = seed
        self._options = options
        self._diagonal = diagonal
        self._n_initial = options.n_initial or _design(dimension, diagonal=diagonal)
        self._design = SobolStream(dimension, random_stream(seed, "map", "design"))
        self._coordinates = array("d")
        self._losses: list[tuple[float, ...]] = []
        self._open: list[tuple[float, ...]] = []
        self._failed: list[tuple[float, ...]] = []
        self._caution = 1.0
        self._n_drawn = 0

    def propose(self) -> tuple[float, ...]:
        """The next point."""
        # a failure tells something too: otherwise a design would not end where most points fail
        n_placed = len(self._losses) + len(self._open) + len(self._failed) // 2
        if len(self._losses) < 2 or n_placed < self._n_initial // (2 if self._options.bayesian else 1):
            point = self._design.next().values
        elif n_placed < self._n_initial:
            surrogates, pending = self._fit(), as_array(self._open, self._dimension)
            point = draw_where_wrong(self._points, surrogates.relative_errors(), pending, self._stream("bayesian"))
        else:
            point = self._refine()
        point = self._placed(point)
        self._open.append(point)
        return point

    def adopt(self, point: tuple[float, ...]) -> None:
        """Replace the last proposed point by `point`."""
        self._open[-1] = self._placed(point)

    def learn(self, point: tuple[float, ...], losses: tuple[float, ...] | None) -> None:
        """Add a result; `losses` is None if it FAILED or was INFEASIBLE."""
        point = self._placed(point)
        if point in self._open:
            self._open.remove(point)
        if losses is None:
            self._failed.append(point)
            self._caution = min(2.0 * self._caution, _MAX_CAUTION)
        else:
            self._caution = 1.0
            self._coordinates.extend(point)
            self._losses.append(losses)

    def diagnostics(self) -> Mapping[str, Json]:
        """The surrogates' leave-one-out R2 by objective; empty before the second result."""
        return {"loo_r2": self._fit().quality()} if len(self._losses) > 1 else {}

    @property
    def _points(self) -> Floats:
        """The points with losses (n, d)."""
        return np.array(self._coordinates).reshape(-1, self._dimension)

    def _fit(self) -> Surrogates:
        losses = tamed(np.array(self._losses), self._n_initial)
        return Surrogates.fitted(self._points, losses, self._objectives, self._options.link, diagonal=self._diagonal)

    def _refine(self) -> tuple[float, ...]:
        """The point of the predicted front with the most hypervolume beyond the predictions for known and pending points.

        The design's next point if the front has no other points, for example if one point is best at everything.
        """
        surrogates, points = self._fit(), self._points
        failed = as_array(self._failed, self._dimension)
        taken = np.vstack([points, as_array(self._open, self._dimension), failed])
        pool = predicted_front(surrogates, points, failed, self._caution, taken, self._choices, self._stream("refine"))
        known = surrogates.predict(np.vstack([points, as_array(self._open, self._dimension)]))
        return most_promising(pool, surrogates.predict(pool), known, taken) or self._design.next().values

    def _placed(self, point: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(placed(np.array(point), self._choices).tolist())

    def _stream(self, purpose: str) -> np.random.Generator:
        self._n_drawn += 1
        return random_stream(self._seed, "map", purpose, self._n_drawn)
