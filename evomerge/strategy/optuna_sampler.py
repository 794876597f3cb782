"""`optuna`: any sampler of Optuna by its class name (arXiv 1907.10902), on d uniform parameters in [0, 1].

The study is kept in memory and rebuilt by replay. Pending candidates are running trials in Optuna.
"""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from inspect import isabstract
from typing import Any, ClassVar, TypeGuard

import numpy as np
import optuna
from numpy.typing import NDArray
from pydantic import Field

from evomerge.core import Candidate, ConfigError, Genome, VectorGenome
from evomerge.strategy.base import Proposal, StrategyOptions, Told, nearly_equal
from evomerge.strategy.mean_loss import behind_all
from evomerge.strategy.replay import FEW_KNOWN, ReplayStrategy

_SINGLE_OBJECTIVE = frozenset({"CmaEsSampler"})
_FINITE = frozenset({"BruteForceSampler", "GridSampler"})
"""Samplers that need finitely many points, which Optuna only checks at the first proposal."""
_NEEDS = {"CmaEsSampler": "cmaes", "GPSampler": "torch"}
"""Packages that Optuna imports at the first proposal of a sampler; missing ones must be reported earlier."""


_OTHERS = _FINITE | {"PartialFixedSampler"}
"""samplers that cannot be used here; the last one wraps another sampler"""


def _is_sampler(one: object) -> TypeGuard[type[optuna.samplers.BaseSampler]]:
    return isinstance(one, type) and issubclass(one, optuna.samplers.BaseSampler) and not isabstract(one)


class OptunaOptions(StrategyOptions):
    """Options of `optuna`."""

    sampler: str = Field("TPESampler", description="class name in optuna.samplers; TPESampler is Optuna's own default")
    sampler_options: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict,
        description="keyword arguments of the sampler, as documented by Optuna; `seed` is set by evomerge",
    )


class OptunaStrategy(ReplayStrategy):
    """Wraps an in-memory Optuna study.

    FAILED and INFEASIBLE candidates are told with losses behind all known ones (per objective the worst plus the range), because Optuna's samplers ignore
    failed trials and would propose their neighbours again; before any result is known they become failed trials. Seeds become finished trials.
    """

    name: ClassVar[str] = "optuna"
    options_type: ClassVar[type[StrategyOptions]] = OptunaOptions
    max_known = FEW_KNOWN
    options: OptunaOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.objectives) > 1 and self.options.sampler in _SINGLE_OBJECTIVE:
            raise ConfigError(
                f"strategy optuna: {self.options.sampler} takes one objective, got {len(self.objectives)}; "
                "use TPESampler, NSGAIISampler or GPSampler, or the strategy cma_es with weights"
            )
        self._space: dict[str, optuna.distributions.BaseDistribution] = {
            f"x{index}": optuna.distributions.FloatDistribution(0.0, 1.0) for index in range(self.dimension)
        }
        self._trial_of: dict[str, int] = {}
        self._extremes: NDArray[np.float64] | None = None
        self._study = _silent_study(self._sampler(), len(self.objectives))

    def _sampler(self) -> optuna.samplers.BaseSampler:
        name = self.options.sampler
        sampler_type = getattr(optuna.samplers, name, None)
        if not _is_sampler(sampler_type):
            known = [
                one
                for one in sorted(optuna.samplers.__all__)
                if one not in _OTHERS and _is_sampler(getattr(optuna.samplers, one))
            ]
            raise ConfigError(f"strategy optuna: there is no sampler {name!r}; known: {', '.join(known)}")
        if name in _FINITE:
            raise ConfigError(
                f"strategy optuna: {name} enumerates finitely many points, but the coordinates are real; use QMCSampler to cover the space"
            )
        if name in _NEEDS and importlib.util.find_spec(_NEEDS[name]) is None:
            raise ConfigError(
                f"strategy optuna: {name} needs the package {_NEEDS[name]!r}; install it or choose another sampler"
            )
        try:
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                return sampler_type(**self._seeded(self.options.sampler_options))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"strategy optuna: {name} does not take {dict(self.options.sampler_options)}: {error}"
            ) from error

    def _seeded(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if "seed" in options:
            raise ConfigError(
                "strategy optuna: leave `seed` out of sampler_options; it is derived from the search's seed"
            )
        return {**options, "seed": self.random_seed % 2**32}

    def _start(self, seeds: Sequence[Told]) -> None:
        for seed in seeds:
            if seed.losses is not None:
                self._note_extremes(seed.losses)
                trial = optuna.trial.create_trial(
                    params=dict(zip(self._space, seed.candidate.point, strict=True)),
                    distributions=self._space,
                    values=list(seed.losses),
                )
                self._study.add_trial(trial)

    def _propose(self) -> Proposal:
        trial = self._study.ask(self._space)
        self._trial_of[self._next_id] = trial.number
        return Proposal(VectorGenome(tuple(min(max(float(trial.params[name]), 0.0), 1.0) for name in self._space)))

    def _withdraw(self) -> bool:
        self._study.tell(self._trial_of.pop(self._next_id), state=optuna.trial.TrialState.FAIL)
        return True

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:
        if not nearly_equal(recorded.genome, proposed) and recorded.id in self._trial_of:
            self._study.tell(self._trial_of.pop(recorded.id), state=optuna.trial.TrialState.FAIL)

    def _learn(self, told: Told) -> None:
        number = self._trial_of.pop(told.candidate.id, None)
        if number is None:
            self._start([told])
        elif told.losses is not None:
            self._note_extremes(told.losses)
            self._study.tell(number, list(told.losses))
        elif self._extremes is not None:
            self._study.tell(number, [behind_all(column) for column in self._extremes.T])
        else:
            self._study.tell(number, state=optuna.trial.TrialState.FAIL)

    def _note_extremes(self, losses: Sequence[float]) -> None:
        """Update the smallest and largest known loss of every objective, (2, m)."""
        rows = np.array([losses]) if self._extremes is None else np.vstack([self._extremes, losses])
        self._extremes = np.array([rows.min(axis=0), rows.max(axis=0)])


def _silent_study(sampler: optuna.samplers.BaseSampler, n_objectives: int) -> optuna.Study:
    """A minimising study, without Optuna's log message about its creation."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(sampler=sampler, directions=["minimize"] * n_objectives)
    finally:
        optuna.logging.set_verbosity(verbosity)
