"""`nevergrad`: any optimiser of Nevergrad by its registered name, on d coordinates bounded to [0, 1].

LoRAHub (arXiv 2307.13269) is `optimizer: NGOpt`, `budget: 40` and an L1 penalty of 0.05 per unit of mean |w| with
w in [-1.5, 1.5]; in unit coordinates: `l1: 0.15` around `l1_centre: 0.5`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import nevergrad
import numpy as np
from pydantic import Field

from evomerge.core import Candidate, ConfigError, Genome, Json, VectorGenome, random_stream
from evomerge.strategy.base import Floats, Proposal, StrategyOptions, Told, nearly_equal
from evomerge.strategy.replay import FEW_KNOWN, ReplayStrategy

_FAILING = {
    "BO": "it fails when it proposes a point twice, which happens if the best point is at a bound, or is told an infinite indicator, which "
    "happens with several objectives; use the strategy bo instead",
    "Carola3": "it fails at the second result",
}
"""Optimisers of nevergrad 1.0.12 whose own code crashes -> the reason; no other one did in 60 evaluations of
one objective (24 for the slowest) or in 20 of two."""

_END_OF_PLAN = "Over the budget"
"""nevergrad's error message for one proposal too many; portfolios that divide their budget among plans raise it before the budget is used up"""

_UNKNOWN_LOSS = 1e20
"""Below 5e20, where nevergrad clips losses."""


def _is_planned(optimizer: Any) -> bool:
    """Whether it plans exactly as many proposals as its budget, some of them in advance, so that known points cannot be replaced by others."""
    return bool(optimizer.one_shot) or any(map(_is_planned, getattr(optimizer, "optims", [])))


_FEWEST_COORDINATES = 2
"""minimum number of coordinates passed to optimisers: in one dimension, CMA of nevergrad 1.0.12 requires the package fcmaes, and from then on
also in all other searches of the process"""


class NevergradOptions(StrategyOptions):
    """Options of `nevergrad`."""

    optimizer: str = Field(
        "NGOpt", description="name in nevergrad.optimizers.registry; NGOpt chooses by dimension and budget"
    )
    budget: int = Field(
        100, ge=1, description="number of evaluations to plan for; `evomerge search` sets it to the search's budget"
    )
    n_workers: int = Field(
        2,
        ge=2,
        le=10_000,
        description="usual number of pending candidates; 1 would select methods that run in threads and block",
    )
    l1: float = Field(
        0.0, ge=0.0, allow_inf_nan=False, description="added to every loss per unit of mean |x - l1_centre|"
    )
    l1_centre: float = Field(0.5, ge=0.0, le=1.0, description="unit coordinate towards which the L1 penalty pulls")


class NevergradStrategy(ReplayStrategy):
    """Wraps a Nevergrad optimiser; several objectives are combined by its hypervolume indicator.

    Strictly sequential optimisers (Cobyla, SQP, Powell; NGOpt with one worker would choose one of them) are refused: they
    run in a thread that blocks the next ask, outlives the search and cannot be resumed.

    FAILED and INFEASIBLE candidates are told with the worst loss so far plus the range so far. Before any result is known they
    are told with 1e20; with several objectives they are held back instead, because such a value would fix the indicator's bounds. Seeds
    are told as points that were not asked; optimisers that do not support this start without them. `recommend` ignores the L1 penalty.
    """

    name: ClassVar[str] = "nevergrad"
    options_type: ClassVar[type[StrategyOptions]] = NevergradOptions
    options: NevergradOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        registry = nevergrad.optimizers.registry
        if self.options.optimizer not in registry:
            raise ConfigError(
                f"strategy nevergrad: there is no optimizer {self.options.optimizer!r}; usual ones: NGOpt, CMA, DE, "
                "TwoPointsDE, OnePlusOne, PSO, TBPSA (all: nevergrad.optimizers.registry)"
            )
        if self.options.optimizer in _FAILING:
            raise ConfigError(
                f"strategy nevergrad: {self.options.optimizer} cannot be used: {_FAILING[self.options.optimizer]}"
            )
        if registry[self.options.optimizer].no_parallelization:
            raise ConfigError(
                f"strategy nevergrad: {self.options.optimizer} cannot be used: it is strictly sequential, but a search has several pending candidates"
            )
        # parts of nevergrad (metamodels, some mutations) draw from NumPy's global generator: give them a separate state
        self._global_state = np.random.RandomState(
            random_stream(self.random_seed, "nevergrad").integers(2**32)
        ).get_state()
        before = self._global_state
        with self._quiet():
            self._make_optimizer(tried=True)
        self._global_state = before
        with self._quiet():
            self._optimizer = self._make_optimizer()
        self.max_known = 0 if _is_planned(self._optimizer) else FEW_KNOWN
        self._is_used_up = False
        self._asked: dict[str, Any] = {}
        self._held_back: list[Any] = []
        self._span: Floats | None = None
        """(2, m): the smallest and the largest losses so far; None before the first result"""

    def _make_optimizer(self, *, tried: bool = False) -> Any:
        """A fresh optimiser; if `tried`, it is asked once to find out whether it works."""
        array = nevergrad.p.Array(init=self._padded([0.5] * self.dimension), lower=0.0, upper=1.0)
        # nevergrad uses the legacy generator; this one is used by the optimiser only
        array.random_state = np.random.RandomState(self.random_seed % 2**32)
        try:
            optimizer = nevergrad.optimizers.registry[self.options.optimizer](
                array, budget=self.options.budget, num_workers=self.options.n_workers
            )
            if tried:
                optimizer.ask()
        except (ValueError, ImportError, AssertionError) as error:
            raise ConfigError(
                f"strategy nevergrad: {self.options.optimizer} cannot be used with these settings: {error}"
            ) from error
        return optimizer

    def _padded(self, point: Sequence[float]) -> Floats:
        """A point in the optimiser's form, with at least `_FEWEST_COORDINATES` coordinates."""
        return np.array([*point, *[0.5] * (_FEWEST_COORDINATES - self.dimension)])

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Hide Nevergrad's warnings and gives NumPy's global generator a separate state, which is swapped back afterwards."""
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._global_state)  # noqa: NPY002
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            self._global_state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(outside)  # noqa: NPY002

    def _start(self, seeds: Sequence[Told]) -> None:
        for seed in seeds:
            if seed.losses is not None:
                self._tell_not_asked(seed)

    def _tell_not_asked(self, told: Told) -> None:
        """Tell a result for a point that the optimiser did not propose; optimisers that do not support this never see it."""
        with self._quiet():
            point = self._optimizer.parametrization.spawn_child(new_value=self._padded(told.candidate.point))
        # differential evolution finds the members to replace by this, and would fail on points that it did not propose
        point.heritage["lineage"] = point.uid
        with suppress(nevergrad.errors.TellNotAskedNotSupportedError):
            self._tell(point, self._penalised(told))

    def stop_reasons(self) -> Mapping[str, Json]:
        """Also `plan`, if the optimiser has made all its planned proposals."""
        return {**super().stop_reasons(), **({"plan": self.options.budget} if self._is_used_up else {})}

    def _propose(self) -> Proposal | None:
        try:
            with self._quiet():
                point = self._optimizer.ask()
        except AssertionError as error:
            if _END_OF_PLAN not in str(error):
                raise
            self._is_used_up = True
            return None
        self._asked[self._next_id] = point
        values = np.asarray(point.value, dtype=np.float64)[: self.dimension]
        return Proposal(VectorGenome(tuple(np.clip(values, 0.0, 1.0).tolist())))

    def _withdraw(self) -> bool:
        del self._asked[self._next_id]
        return True

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:
        if nearly_equal(recorded.genome, proposed) or recorded.id not in self._asked:
            return
        # an optimiser may wait for its own proposal and not accept another point: its own point is told as failed, and the recorded
        # one as a point that was not asked
        self._fail(self._asked.pop(recorded.id))

    def _learn(self, told: Told) -> None:
        point = self._asked.pop(told.candidate.id, None)
        if told.losses is None:
            if point is not None:
                self._fail(point)
            return
        if point is None:
            self._tell_not_asked(told)
        else:
            self._tell(point, self._penalised(told))
        held_back, self._held_back = self._held_back, []
        for waiting in held_back:
            self._fail(waiting)

    def _fail(self, point: Any) -> None:
        if self._span is not None:
            self._tell(point, self._worst(self._span))
        elif len(self.objectives) == 1:
            self._tell(point, (_UNKNOWN_LOSS,) * len(self.objectives))
        else:
            self._held_back.append(point)

    def _penalised(self, told: Told) -> tuple[float, ...]:
        penalty = self.options.l1 * float(np.mean(np.abs(np.array(told.candidate.point) - self.options.l1_centre)))
        losses = tuple(loss + penalty for loss in told.losses or ())
        span = np.array([losses, losses] if self._span is None else [*self._span, losses])
        self._span = np.array([span.min(axis=0), span.max(axis=0)])
        return losses

    @staticmethod
    def _worst(span: Floats) -> tuple[float, ...]:
        spread = span[1] - span[0]
        return tuple((span[1] + np.where(spread > 0.0, spread, 1.0)).tolist())

    def _tell(self, point: Any, losses: tuple[float, ...]) -> None:
        with self._quiet():
            self._optimizer.tell(point, losses[0] if len(losses) == 1 else np.array(losses))
