"""`cycleqd` and `map_elites`: quality diversity. Archives keep the best candidate for every behaviour; the behaviours are the tasks' scores.

`cycleqd` is CycleQD (arXiv 2410.14735): there is an archive for each objective, with that objective as its quality and all others as its axes.
The archives take turns in providing two parents, drawn by their quality and their scores on the axes; a child is offered to every archive. Each
task is thus optimised at every level of the others, instead of only their mean or their front. `map_elites` (arXiv 1504.04909) is the plain form:
a single archive whose quality is the mean of all objectives and whose axes are all of them, with parents drawn uniformly.

Symbols of the paper: w_i the weights of the parents, alpha_low and alpha_high the range into which quality and axes are scaled for drawing.

Deliberate differences from the paper, which merges weights with the experts as its first elites:
- Crossover acts on points of the space. With task arithmetic, a weighted mean of two candidates' task vectors is the point between them, so it
  equals the published crossover; with other methods it is a crossover of their parameters.
- Its mutation scales singular values of task vectors; here a point moves by normal noise.
- The cells cover the range of the first results, widened by 15% (at most by half of the range), as the paper widens that of the experts. Besides
  the seeds, the first results come from a Sobol sequence in which the groups of a parameter are correlated: the experts alone say little about a space.
- Weights of parents vary by 0.3, not 0.01: on the demo models this found more (docs/strategies.md).
- The paper's last step, a softmax of the best of every archive, is left out: the finals choose among evaluated candidates.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.archive import EliteGrid
from evomerge.core import Candidate, ConfigError, Json, VectorGenome, random_stream, weights_in_mean
from evomerge.strategy.base import Floats, Proposal, StrategyOptions, Told
from evomerge.strategy.inheritance import inherited_choices
from evomerge.strategy.replay import FEW_KNOWN, ReplayStrategy
from evomerge.strategy.sampling import FirstPointsOptions, first_points

FEWEST_INITIAL, MOST_INITIAL = 10, 20

_WIDENED = 0.15
_LEAST_WEIGHT_SUM = 1e-3
"""If the sum of two parents' weights is smaller than this, the middle of the parents is used."""


class ElitesOptions(FirstPointsOptions):
    """Options of `cycleqd` and `map_elites`."""

    n_bins: int = Field(15, ge=1, le=1000, description="cells along each axis (CycleQD: 15)")
    n_initial: int | None = Field(
        None,
        ge=2,
        description="number of results, including seeds, before parents are drawn (until then, points of a first design); None: one per coordinate, "
        f"{FEWEST_INITIAL} to {MOST_INITIAL}",
    )
    crossover_sigma: float = Field(
        0.3,
        ge=0.0,
        le=10.0,
        description="standard deviation of the parents' weights around 1 (CycleQD's code: 0.01, which is nearly the middle)",
    )
    mutation_sigma: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="standard deviation of a child's normal noise, as a share of a coordinate's range",
    )


class CycleQdOptions(ElitesOptions):
    """Options of `cycleqd`."""

    alpha_low: float = Field(
        0.5, ge=0.0, le=1.0, description="weight of an archive's worst elite when parents are drawn (paper)"
    )
    alpha_high: float = Field(0.8, ge=0.0, le=1.0, description="weight of its best elite (paper)")


class _Archive:
    """A grid with its elites.

    Args:
        quality: (m,), weights of the objectives in the quality.
        axes: indices of the objectives that are axes.
        low, high: (m,), range of the cells.
        n_bins: cells along each axis.
    """

    def __init__(self, quality: Floats, axes: Sequence[int], low: Floats, high: Floats, n_bins: int) -> None:
        self._quality, self._axes = quality, list(axes)
        self._least = float(quality @ low)
        self.grid = EliteGrid(low[self._axes], high[self._axes], n_bins)
        self.elites: list[Candidate] = []

    def offer(self, candidate: Candidate, fitness: Floats) -> None:
        """Add the candidate if it is the best of its cell."""
        slot = self.grid.add(float(self._quality @ fitness), fitness[self._axes])
        if slot is not None:
            self.elites[slot : slot + 1] = [candidate]

    def report(self) -> dict[str, Json]:
        """Statistics of its contents."""
        best = self.elites[int(np.argmax(self.grid.qualities))].id if self.elites else None
        return {
            "elites": len(self.grid),
            "cells": self.grid.n_cells,
            "qd_score": self.grid.score(self._least),
            "best": best,
        }


class _Elites(ReplayStrategy):
    """A steady-state search that fills grids; subclasses choose the grids and how parents are drawn.

    FAILED and INFEASIBLE candidates never enter an archive. Seeds are offered first.
    """

    options_type: ClassVar[type[StrategyOptions]] = ElitesOptions
    uses_families: ClassVar[bool] = True
    max_known = FEW_KNOWN
    options: ElitesOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.objectives) < 2:
            raise ConfigError(
                f"strategy {self.name} needs at least two objectives to distinguish candidates by their scores, got one; use cma_es or ga"
            )
        self._generator = random_stream(self.random_seed, self.name, "mating")
        self._initial = first_points(
            self.dimension,
            self.families,
            self.options.group_correlation,
            random_stream(self.random_seed, self.name, "sobol"),
        )
        self._scored: list[tuple[Candidate, Floats]] = []
        self._flat = np.zeros(len(self.objectives), dtype=bool)
        """objectives with the same score in all results when the archives were created, so that the range of their cells is unknown"""
        self._archives: Mapping[str, _Archive] = {}
        self._n_bred = 0
        self._n_initial = self.options.n_initial or min(max(self.dimension, FEWEST_INITIAL), MOST_INITIAL)

    @abstractmethod
    def _make_archives(self, low: Floats, high: Floats) -> Mapping[str, _Archive]:
        """Empty archives by name; `low` and `high`, (m,), are the range of the scores, higher is better."""

    @abstractmethod
    def _chances(self, archive: _Archive) -> Floats:
        """Probability of each elite to become a parent, (n,), with a sum of 1."""

    def diagnostics(self) -> Mapping[str, Json]:
        """For each archive: the number of elites and cells, the QD score, and the best elite."""
        return {"archives": {name: archive.report() for name, archive in self._archives.items()}}

    def _propose(self) -> Proposal:
        if not self._archives and len(self._scored) >= self._n_initial:
            self._open_archives()
        breeding = [archive for archive in self._archives.values() if len(archive.elites) >= 2]
        if not breeding:
            return Proposal(self._initial.next())
        archive = breeding[self._n_bred % len(breeding)]
        self._n_bred += 1
        return self._child(archive)

    def _learn(self, told: Told) -> None:
        if told.losses is None:
            return
        fitness = -np.array(told.losses)
        self._scored.append((told.candidate, fitness))
        if bool((fitness != self._scored[0][1])[self._flat].any()):
            self._open_archives()
            return
        for archive in self._archives.values():
            archive.offer(told.candidate, fitness)

    def _withdraw(self) -> bool:
        return True

    def _open_archives(self) -> None:
        scores = np.array([fitness for _, fitness in self._scored])
        low, high = scores.min(axis=0), scores.max(axis=0)
        self._flat = low == high
        # by at most half of the range: otherwise scores far from 0 would share a cell
        below, above = (np.minimum(_WIDENED * np.abs(end), (high - low) / 2) for end in (low, high))
        self._archives = self._make_archives(low - below, high + above)
        for candidate, fitness in self._scored:
            for archive in self._archives.values():
                archive.offer(candidate, fitness)

    def _child(self, archive: _Archive) -> Proposal:
        draw = self._generator
        slots = draw.choice(len(archive.elites), 2, replace=False, p=self._chances(archive))
        parents = [archive.elites[slot] for slot in slots]
        first, second = (np.array(parent.point) for parent in parents)
        weights = draw.normal(1.0, self.options.crossover_sigma, 2)
        share = weights[1] / weights.sum() if abs(weights.sum()) > _LEAST_WEIGHT_SUM else 0.5
        child = first + share * (second - first)
        if self.options.mutation_sigma > 0.0:
            child += self.options.mutation_sigma * draw.standard_normal(self.dimension)
        if len(self._discrete):
            child[self._discrete] = inherited_choices(
                first[self._discrete], second[self._discrete], self._counts, min(0.5, 1.0 / self.dimension), draw
            )
        return Proposal(VectorGenome(tuple(np.clip(child, 0.0, 1.0).tolist())), tuple(parent.id for parent in parents))


class CycleQd(_Elites):
    """CycleQD: an archive for each objective, used in turn."""

    name: ClassVar[str] = "cycleqd"
    options_type: ClassVar[type[StrategyOptions]] = CycleQdOptions
    options: CycleQdOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.options.alpha_low > self.options.alpha_high:
            raise ConfigError(
                f"strategy {self.name}: alpha_low, {self.options.alpha_low:g}, must not exceed alpha_high, {self.options.alpha_high:g}"
            )

    def _make_archives(self, low: Floats, high: Floats) -> Mapping[str, _Archive]:
        own = np.eye(len(self.objectives))
        others = [[axis for axis in range(len(own)) if axis != index] for index in range(len(own))]
        return {
            objective.name: _Archive(own[index], others[index], low, high, self.options.n_bins)
            for index, objective in enumerate(self.objectives)
        }

    def _chances(self, archive: _Archive) -> Floats:
        """Elite sampling: the product of quality and axes, each scaled within the archive to [alpha_low, alpha_high]."""
        table = np.column_stack([archive.grid.qualities, archive.grid.behaviours])
        low, spread = table.min(axis=0), np.ptp(table, axis=0)
        norm = np.divide(table - low, spread, out=np.ones_like(table), where=spread > 0.0)
        worth = (self.options.alpha_low + norm * (self.options.alpha_high - self.options.alpha_low)).prod(axis=1)
        total = worth.sum()
        return worth / total if np.count_nonzero(worth) >= 2 else np.full(len(worth), 1.0 / len(worth))


class MapElites(_Elites):
    """MAP-Elites: a single archive for the mean of all objectives."""

    name: ClassVar[str] = "map_elites"

    def _make_archives(self, low: Floats, high: Floats) -> Mapping[str, _Archive]:
        weights = np.array(weights_in_mean(self.objectives))
        mean = _Archive(weights / weights.sum(), range(len(weights)), low, high, self.options.n_bins)
        return {"mean": mean}

    def _chances(self, archive: _Archive) -> Floats:
        return np.full(len(archive.elites), 1.0 / len(archive.elites))
