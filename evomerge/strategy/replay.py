"""The bookkeeping shared by all strategies, and resuming by replay.

The state is the ordered log of seeds, asks and tells. Loading it rebuilds the algorithm from its seed and replays the log,
which reproduces every proposal bit for bit. No algorithm therefore needs its own snapshot, and libraries that cannot save their
state are resumed as exactly as those that can. If another processor or version rounds differently, `repeat` lets the
algorithm continue from the recorded candidates.
"""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import ClassVar, cast

import numpy as np

from evomerge.core import (
    Candidate,
    ConfigError,
    Evaluation,
    EvaluationError,
    Genome,
    JournalError,
    Json,
    Objective,
    SpaceError,
    VectorGenome,
    random_stream,
)
from evomerge.space import Conditions, middles_of, placed
from evomerge.strategy.base import Proposal, StrategyOptions, Told, candidate_id
from evomerge.strategy.mean_loss import MeanLoss
from evomerge.strategy.replay_log import BestKnown, ReplayLog, digest, read_adopted, read_result, read_seed, rows_of
from evomerge.strategy.results import results_of

_ASKED_ID = re.compile(r"c\d+")
"""Pattern of proposals' ids; seeds have other ids."""
_FORMAT = 1

FEW_KNOWN = 10
"""`max_known` for algorithms whose proposals become slower with every result: with 30, Optuna's TPE took 0.15 s for each."""

_N_UNIFORM = 100
"""Number of uniform points tried to find one whose result is not known."""


class ReplayStrategy(ABC):
    """Implements the `Strategy` protocol around the hooks below; subclasses must implement `_propose` and `_learn`.

    Subclasses must be deterministic: `_propose` may depend only on the constructor's arguments and on the sequence of earlier
    proposals and results.

    Args:
        dimension: number of unit coordinates, d >= 1.
        objectives: the m >= 1 objectives.
        seed: of all random numbers, >= 0.
        options: an instance of `options_type`; None for the defaults.
        choices: (d,), the number of choices of each categorical coordinate, 0 for real ones; None = all real. Choice i of n is
            any value in [i/n, (i+1)/n). Strategies that ignore it search a step function.
        families: (d,), the index of each coordinate's family, whose members are likely to need similar values; None = no
            families. Only for classes with `uses_families`.
        conditions: (d,), see `SearchSpace.conditions`: points that differ only in coordinates without effect count as equal; None = all
            coordinates always have an effect.

    Raises:
        ConfigError: an argument is out of range.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[StrategyOptions]] = StrategyOptions
    needs_items: ClassVar[bool] = False
    """Whether `Told.items` is filled and kept in the state."""
    uses_families: ClassVar[bool] = False
    """Whether it is told which coordinates form families."""
    averages: ClassVar[bool] = False
    """Whether it optimises the mean of several objectives; if so, it has a `_mean_loss`."""
    _mean_loss: MeanLoss
    """mean losses; contains every result that the algorithm is told"""
    max_known: int = 0
    """A proposal whose result is known is answered with that result instead of being asked; a pending one is withdrawn if the algorithm supports
    it. After this many in a row, a new uniform point, or one of the few remaining points, is asked instead. 0 = never; required if `_propose` may
    return None. For algorithms that sample a distribution: samples repeat in a space of few points, or with the optimum in a corner."""

    def __init__(
        self,
        dimension: int,
        objectives: Sequence[Objective],
        seed: int,
        options: StrategyOptions | None = None,
        *,
        choices: Sequence[int] | None = None,
        families: Sequence[int] | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        if dimension < 1:
            raise ConfigError(f"strategy {self.name}: the space has {dimension} dimensions; it needs at least one")
        if not objectives:
            raise ConfigError(f"strategy {self.name}: no objective given; name at least one task")
        if seed < 0:
            raise ConfigError(f"strategy {self.name}: seed must be >= 0, got {seed}")
        if choices is not None and (len(choices) != dimension or any(count < 0 or count == 1 for count in choices)):
            raise ConfigError(
                f"strategy {self.name}: choices needs one number per coordinate ({dimension}), 0 or at least 2; got {list(choices)}"
            )
        if families is not None and len(families) != dimension:
            raise ConfigError(
                f"strategy {self.name}: families needs one number per coordinate ({dimension}), got {len(families)}"
            )
        self.dimension = dimension
        self.families = None if families is None or len(set(families)) == dimension else tuple(families)
        self.choices = (0,) * dimension if choices is None else tuple(choices)
        self._conditions = [(number, *found) for number, found in enumerate(conditions or ()) if found is not None]
        """(coordinate, categorical coordinate that it depends on, choices with which it has an effect)"""
        self.objectives = tuple(objectives)
        self.random_seed = seed
        self.options = self.options_type() if options is None else options
        self._log = ReplayLog(len(self.objectives))
        self._n_asked = 0
        self._pending: dict[str, Candidate] = {}
        self._seed_ids: set[str] = set()
        self._best_known: BestKnown | MeanLoss = BestKnown()
        if self.averages:
            self._best_known = self._mean_loss = MeanLoss(self.objectives)
        self._discrete = np.flatnonzero(self.choices)
        """indices of the categorical coordinates, (k,); `_counts` are their numbers of choices, (k,)"""
        self._counts = np.array(self.choices)[self._discrete]
        self._n_points = prod(self.choices)
        """number of points of the space; 0 if it has real coordinates"""
        self._seeds: list[Told] = []
        self._result_at: dict[str, int | None] = {}
        """digest of a point's `_place` -> index of its result in the log, or, inverted (~), in `_seeds`; None while it is pending"""
        self._left: list[VectorGenome] | None = None
        """in a space without real coordinates, a superset of the points not asked yet; None until they are so few that uniform points miss them"""

    # --- hooks ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _propose(self) -> Proposal | None:
        """The next point, or None (without changing the state) if it has to wait for pending results."""

    @abstractmethod
    def _learn(self, told: Told) -> None:
        """Process one result of an asked candidate."""

    def _start(self, seeds: Sequence[Told]) -> None:
        """Process points known beforehand; called at most once per call of `seed`, and always before the first `_propose`."""
        for seed in seeds:
            self._learn(seed)

    def _adopt(self, recorded: Candidate, proposed: Genome | None) -> None:  # noqa: B027 - most have nothing to do
        """Called when `recorded` replaces the genome (or None) that was just proposed.

        For algorithms that remember their proposals. Called twice for the same id if a uniform point had already replaced the proposal.
        """

    def _learn_again(self, told: Told) -> None:
        """Process the known result of a point that was just proposed again and is not asked, as if it were the result of the next candidate.

        Override it in algorithms that store candidates by id.
        """
        self._learn(told)

    def _withdraw(self) -> bool:
        """Forget the proposal just made, which equals a pending candidate. Returns False if it must be asked again, as for algorithms that wait for it."""
        return False

    def _recall(self, was: Callable[[Genome], bool]) -> Proposal | None:
        """A faster `_propose` for a replay, where the proposed genome is known (`was`): skips choosing among a few points. None if it was none of them.

        It must leave the same state as `_propose`.
        """
        return None

    # --- the protocol --------------------------------------------------------------------------------------------

    def ask(self, n: int) -> Sequence[Candidate]:
        """See `Strategy.ask`. `ask(n)` equals n times `ask(1)`.

        Raises:
            ConfigError: n < 0.
        """
        if n < 0:
            raise ConfigError(f"ask(n) needs n >= 0, got {n}")
        return self._ask(n)

    def _ask(self, n: int, recorded: Sequence[Json] = ()) -> list[Candidate]:
        """`ask(n)`; in a replay, `recorded` contains the digests of the candidates asked originally."""
        asked: list[Candidate] = []
        while len(asked) < n:
            proposal = None
            if recorded:
                wanted = recorded[len(asked)]
                proposal = self._recall(lambda genome, wanted=wanted: digest(Candidate("", genome)) == wanted)  # type: ignore[misc]
            proposal = proposal or self._new_proposal()
            if proposal is None:
                break
            candidate = Candidate(self._next_id, proposal.genome, proposal.parents)
            self._await(candidate)
            asked.append(candidate)
        if asked:
            self._log.ask(asked)
        return asked

    def repeat(self, recorded: Candidate) -> bool:
        """See `Strategy.repeat`."""
        expected = self._next_id
        if recorded.id != expected:
            raise JournalError(
                f"strategy {self.name}: the recorded candidate is {recorded.id}, but the next one must be {expected}"
            )
        proposal = self._recall(lambda genome: genome == recorded.genome) or self._new_proposal()
        self._await(recorded)
        same = proposal is not None and Candidate(expected, proposal.genome, proposal.parents) == recorded
        proposed = None if proposal is None else proposal.genome
        if proposed != recorded.genome:
            self._adopt(recorded, proposed)
        self._log.ask([recorded], adopted=not same)
        return same

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """See `Strategy.tell`."""
        seen: set[str] = set()
        for evaluation in evaluations:
            if self._was_told(evaluation.candidate_id) or evaluation.candidate_id in seen:
                raise EvaluationError(
                    f"candidate {evaluation.candidate_id} was told before; each result can be told only once"
                )
            if evaluation.candidate_id not in self._pending:
                raise EvaluationError(
                    f"candidate {evaluation.candidate_id} was never asked; pending: "
                    f"{', '.join(list(self._pending)[:5]) or 'none'}"
                )
            seen.add(evaluation.candidate_id)
        candidates = [self._pending[evaluation.candidate_id] for evaluation in evaluations]
        results = results_of(self.objectives, candidates, evaluations, with_items=self.needs_items)
        if results:
            self._accept(results)

    def seed(self, candidates: Sequence[Candidate], evaluations: Sequence[Evaluation]) -> None:
        """See `Strategy.seed`."""
        if self._n_asked:
            raise EvaluationError(f"strategy {self.name}: seed() must come before the first ask()")
        ids = [candidate.id for candidate in candidates]
        if ids != [evaluation.candidate_id for evaluation in evaluations]:
            raise EvaluationError("seed() needs one evaluation per candidate, in the same order")
        for candidate in candidates:
            if candidate.id in self._seed_ids or ids.count(candidate.id) > 1:
                raise EvaluationError(f"seed {candidate.id} was given twice")
            if _ASKED_ID.fullmatch(candidate.id):
                raise EvaluationError(f"seed id {candidate.id!r} looks like a proposal's id; give it another id")
            self._check_genome(candidate)
        seeds = results_of(self.objectives, candidates, evaluations, with_items=self.needs_items)
        if seeds:
            self._accept_seeds(seeds)

    def stop_reasons(self) -> Mapping[str, Json]:
        """See `Strategy.stop_reasons`; `space` if every point of a space without real coordinates has a result or is pending."""
        return {"space": self._n_points} if 0 < self._n_points <= len(self._result_at) else {}

    def diagnostics(self) -> Mapping[str, Json]:
        """See `Strategy.diagnostics`; empty unless overridden."""
        return {}

    def recommend(self) -> Candidate:
        """With one objective, or if it `averages` several, the best candidate (the first of equals); otherwise the knee of the front."""
        best = self._best_known.best()
        if best is None:
            raise EvaluationError(f"strategy {self.name}: nothing to recommend, no evaluation has succeeded yet")
        return best

    def state_dict(self) -> dict[str, Json]:
        """See `Strategy.state_dict`; the log contains a digest of each proposal and the losses of each result."""
        return {**self._header(), "log": list(self._log.records())}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """See `Strategy.load_state_dict`."""
        if self._log:
            raise JournalError(f"strategy {self.name}: a state can only be loaded into a fresh strategy")
        for key, expected in self._header().items():
            if state.get(key) != expected:
                raise JournalError(
                    f"the state does not belong to this strategy: {key} is {state.get(key)!r}, expected {expected!r}; resume with "
                    "the configuration with which the run was started"
                )
        try:
            for record in cast(Sequence[Mapping[str, Sequence[Json]]], state["log"]):
                self._replay(record)
        except (KeyError, IndexError, TypeError, ValueError, zlib.error) as error:
            raise JournalError(f"the state of strategy {self.name} is damaged: {error!r}") from error

    # --- inside --------------------------------------------------------------------------------------------------

    @property
    def _next_id(self) -> str:
        """The id of the next proposal, which `_propose` may use as a key."""
        return candidate_id(self._n_asked + 1)

    def _new_proposal(self) -> Proposal | None:
        """The next proposal; see `max_known`."""
        for _ in range(self.max_known):
            proposal = self._propose()
            if proposal is None:
                return None
            key = self._key(proposal.genome)
            if key not in self._result_at:
                return proposal
            number = self._result_at[key]
            if number is None:  # it is pending
                if self._withdraw():
                    continue
                return proposal
            candidate = Candidate(self._next_id, proposal.genome, proposal.parents)
            known = self._seeds[~number] if number < 0 else read_result(candidate, self._log.result(number))
            self._learn_again(replace(known, candidate=candidate))
        proposal = self._propose()
        return self._unknown_instead(proposal) if self.max_known and proposal is not None else proposal

    def _unknown_instead(self, proposal: Proposal) -> Proposal:
        """`proposal`, or, if its result is known or pending, a new uniform point instead (if one is found)."""
        if self._is_new(proposal.genome):
            return proposal
        stream = random_stream(self.random_seed, self.name, "unknown", self._n_asked)
        points = (VectorGenome(tuple(stream.random(self.dimension).tolist())) for _ in range(_N_UNIFORM))
        genome = next((one for one in points if self._is_new(one)), None) or self._one_left(stream)
        if genome is None:
            return proposal
        self._adopt(Candidate(self._next_id, genome), proposal.genome)
        return Proposal(genome)

    def _one_left(self, stream: np.random.Generator) -> VectorGenome | None:
        """A remaining point of a space without real coordinates; looks at all points the first time, and later only at those remaining then."""
        if not self._n_points:
            return None
        choices = (middles_of(np.arange(count), count).tolist() for count in self._counts)
        points = map(VectorGenome, product(*choices)) if self._left is None else self._left
        self._left = [point for point in points if self._is_new(point)]
        return self._left[stream.integers(len(self._left))] if self._left else None

    def _is_new(self, genome: Genome) -> bool:
        return self._key(genome) not in self._result_at

    def _place(self, genome: Genome) -> Genome:
        """The canonical representative of all equivalent genomes: categorical coordinates in the middle of their choice, those without effect at 0.5."""
        if not isinstance(genome, VectorGenome) or not len(self._discrete):
            return genome
        point = placed(np.array(genome.values), np.array(self.choices)).tolist()
        for number, deciding, choices in self._conditions:
            if int(point[deciding] * self.choices[deciding]) not in choices:
                point[number] = 0.5
        return VectorGenome(tuple(point))

    def _key(self, genome: Genome) -> str:
        return digest(Candidate("", self._place(genome)))

    def _await(self, candidate: Candidate) -> None:
        self._n_asked += 1
        self._pending[candidate.id] = candidate
        if self.max_known or self._n_points:
            self._result_at.setdefault(self._key(candidate.genome), None)

    def _remember(self, told: Told, number: int) -> None:
        if self.max_known or self._n_points:
            self._result_at[self._key(told.candidate.genome)] = number

    def _header(self) -> dict[str, Json]:
        return {
            "format": _FORMAT,
            "strategy": self.name,
            "dimension": self.dimension,
            "objectives": [
                [goal.name, str(goal.direction), *([] if goal.weight is None else [goal.weight])]
                for goal in self.objectives
            ],
            "seed": self.random_seed,
            "options": self.options.model_dump(mode="json"),
            **({"choices": list(self.choices)} if any(self.choices) else {}),
            **({"families": list(self.families)} if self.families is not None else {}),
        }

    def _check_genome(self, candidate: Candidate) -> None:
        values = np.asarray(candidate.point, dtype=np.float64)
        if values.shape != (self.dimension,):
            raise SpaceError(
                f"candidate {candidate.id} has {values.size} coordinates, but the space has {self.dimension}"
            )
        if not bool(((values >= 0.0) & (values <= 1.0)).all()):
            worst = int(np.argmax(np.where(np.isnan(values), np.inf, np.abs(values - 0.5))))
            raise SpaceError(f"candidate {candidate.id}: coordinate {worst} is {values[worst]}, outside [0, 1]")

    def _was_told(self, identifier: str) -> bool:
        if identifier in self._pending or not _ASKED_ID.fullmatch(identifier):
            return identifier in self._seed_ids
        number = int(identifier[1:])
        return 1 <= number <= self._n_asked and identifier == candidate_id(number)

    def _accept(self, results: Sequence[Told]) -> None:
        n_before = self._log.n_told
        self._log.tell(results)
        for number, told in enumerate(results, n_before):
            del self._pending[told.candidate.id]
            self._best_known.add(told)
            self._remember(told, number)
            self._learn(told)

    def _accept_seeds(self, seeds: Sequence[Told]) -> None:
        self._log.seed(seeds)
        for told in seeds:
            self._seed_ids.add(told.candidate.id)
            self._best_known.add(told)
            self._remember(told, ~len(self._seeds))
            self._seeds.append(told)
        self._start(seeds)

    def _replay(self, record: Mapping[str, Sequence[Json]]) -> None:
        if "ask" in record:
            self._replay_ask(record["ask"])
        elif "tell" in record:
            results = [read_result(self._pending[cast(str, entry[0])], entry) for entry in rows_of(record, "tell")]
            self._accept(results)
        else:
            self._accept_seeds([read_seed(entry) for entry in rows_of(record, "seed")])

    def _replay_ask(self, asked: Sequence[Json]) -> None:
        if not isinstance(asked[0], str):
            self.repeat(read_adopted(self._next_id, cast(Sequence[Json], asked[0])))
            return
        found = self._ask(len(asked), asked)
        for candidate, recorded in zip(found, asked, strict=False):
            if digest(candidate) != recorded:
                raise JournalError(
                    f"strategy {self.name}: replay proposes a different point for {candidate.id} than was recorded; the "
                    "library versions or the processor may differ from those of the original run"
                )
        if len(found) != len(asked):
            raise JournalError(
                f"strategy {self.name}: replay proposes {len(found)} points, but {len(asked)} were recorded"
            )
