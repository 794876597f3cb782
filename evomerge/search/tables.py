"""Compact storage of a run's candidates and evaluations: two mappings that build their records when they are looked up.

For a run of 100,000 candidates they are smaller than its item matrix; dictionaries of plain records take ten times as much.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.core import Candidate, Evaluation, Genome, JournalError, Json, Split, Status, VectorGenome

_STATUSES = tuple(Status)
_NO_ROW = -1
_DROPPED = 255


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate of the run.

    Attributes:
        id: unique in the run; ids of baselines are `source:<name>`, `uniform`, `task_arithmetic:<weight>`, `recipe:<file>`, ...
        genome: the genome as proposed; None for a baseline outside the space.
        parents: ids of the candidates that it was made from.
        recipe: a baseline's recipe as JSON; None for other candidates, whose recipes are made from their genomes.
        baseline: whether it is a baseline.
        factors: factors of a crossover's parents (docs/journal.md); None if not recorded.
    """

    id: str
    genome: Genome | None
    parents: tuple[str, ...] = ()
    recipe: Mapping[str, Json] | None = None
    baseline: bool = False
    factors: tuple[float, ...] | None = None

    @property
    def values(self) -> tuple[float, ...] | None:
        """Unit coordinates (d,); None for crossovers and outside the space."""
        return self.genome.values if isinstance(self.genome, VectorGenome) else None

    def candidate(self) -> Candidate:
        """The candidate, as strategies use it.

        Raises:
            JournalError: it has no genome.
        """
        if self.genome is None:
            raise JournalError(f"{self.id} is not a point of the search space")
        return Candidate(self.id, self.genome, self.parents)


class EntryTable(Mapping[str, Entry]):
    """Candidates by id, in the order they were added. Each lookup makes a new, equal `Entry`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._index: dict[str, int] = {}
        self._genomes: list[bytes | Genome | None] = []
        self._parents: list[tuple[str, ...]] = []
        self._baselines: dict[str, Mapping[str, Json] | None] = {}
        self._factors: dict[str, bytes] = {}

    def add(self, entry: Entry) -> None:
        """Append an entry.

        Raises:
            JournalError: there is already an entry with this id.
        """
        if entry.id in self._index:
            raise JournalError(f"candidate id {entry.id} is already taken")
        self._index[entry.id] = len(self._names)
        self._names.append(entry.id)
        values = entry.values
        self._genomes.append(entry.genome if values is None else array("d", values).tobytes())
        self._parents.append(tuple(self.name(parent) for parent in entry.parents))
        if entry.baseline:
            self._baselines[entry.id] = entry.recipe

    def add_factors(self, identifier: str, factors: Sequence[float]) -> None:
        """Store the factors of a crossover's parents.

        Raises:
            JournalError: there is no such candidate.
        """
        if identifier not in self._index:
            raise JournalError(f"the journal has factors of {identifier} but no such candidate")
        self._factors[self.name(identifier)] = array("d", factors).tobytes()

    def name(self, identifier: str) -> str:
        """The stored string object equal to `identifier`, so that all uses share one; `identifier` itself if unknown."""
        row = self._index.get(identifier)
        return identifier if row is None else self._names[row]

    def position(self, identifier: str) -> int:
        """How many entries were added before it."""
        return self._index[identifier]

    def baselines(self) -> list[Entry]:
        """The baselines, in the order they were declared."""
        return [self[name] for name in self._baselines]

    @property
    def n_baselines(self) -> int:
        """How many entries are baselines."""
        return len(self._baselines)

    def is_baseline(self, identifier: str) -> bool:
        """Whether `identifier` is a baseline."""
        return identifier in self._baselines

    def __getitem__(self, identifier: str) -> Entry:
        row = self._index[identifier]
        packed = self._genomes[row]
        genome = VectorGenome(tuple(array("d", packed))) if isinstance(packed, bytes) else packed
        recipe, made = self._baselines.get(identifier), self._factors.get(identifier)
        factors = None if made is None else tuple(array("d", made))
        return Entry(self._names[row], genome, self._parents[row], recipe, identifier in self._baselines, factors)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(slots=True)
class _Columns:
    """The evaluations of one split, one per row; `numbers` holds scores, standard errors and costs, whose names are given by `shape`."""

    rows: dict[str, int] = field(default_factory=dict)
    status: bytearray = field(default_factory=bytearray)
    shape: "array[int]" = field(default_factory=lambda: array("H"))
    start: "array[int]" = field(default_factory=lambda: array("Q"))
    numbers: "array[float]" = field(default_factory=lambda: array("d"))
    item_row: "array[int]" = field(default_factory=lambda: array("q"))
    checksum: "array[int]" = field(default_factory=lambda: array("Q"))
    errors: dict[int, str] = field(default_factory=dict)


_Shape = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""names of the scores, standard errors and costs"""


class EvaluationTable(Mapping[tuple[str, Split], Evaluation]):
    """(id, split) -> evaluation without item scores; iterates split by split, in the order of addition."""

    def __init__(self) -> None:
        self._splits: dict[Split, _Columns] = {}
        self._shapes: list[_Shape] = []
        self._shape_index: dict[_Shape, int] = {}

    def add(self, evaluation: Evaluation, place: tuple[int, str] | None) -> None:
        """Append an evaluation and the place of its item scores: (row, checksum) in the item store, or None.

        Raises:
            JournalError: this candidate already has an evaluation on this split.
        """
        columns = self._splits.setdefault(evaluation.split, _Columns())
        if evaluation.candidate_id in columns.rows:
            raise JournalError(f"{evaluation.candidate_id} is evaluated twice on {evaluation.split}")
        parts = (evaluation.scores, evaluation.stderr, evaluation.cost)
        shape = (tuple(parts[0]), tuple(parts[1]), tuple(parts[2]))
        if shape not in self._shape_index:
            self._shape_index[shape] = len(self._shapes)
            self._shapes.append(shape)
        row = len(columns.status)
        columns.rows[evaluation.candidate_id] = row
        columns.status.append(_STATUSES.index(evaluation.status))
        columns.shape.append(self._shape_index[shape])
        columns.start.append(len(columns.numbers))
        for part in parts:
            columns.numbers.extend(part.values())
        columns.item_row.append(_NO_ROW if place is None else place[0])
        columns.checksum.append(0 if place is None else int(place[1], 16))
        if evaluation.error is not None:
            columns.errors[row] = evaluation.error

    def drop(self, identifier: str, split: Split) -> None:
        """Remove an evaluation that has no item scores."""
        columns = self._splits[split]
        row = columns.rows.pop(identifier)
        columns.status[row] = _DROPPED
        columns.errors.pop(row, None)

    def status(self, identifier: str, split: Split) -> Status | None:
        """The status of an evaluation; None if there is none."""
        columns = self._splits.get(split)
        row = None if columns is None else columns.rows.get(identifier)
        return None if columns is None or row is None else _STATUSES[columns.status[row]]

    def place(self, identifier: str, split: Split) -> tuple[int, str] | None:
        """(row, checksum) of an evaluation's item scores; None if it has none."""
        columns = self._splits.get(split)
        row = None if columns is None else columns.rows.get(identifier)
        if columns is None or row is None or columns.item_row[row] == _NO_ROW:
            return None
        return columns.item_row[row], f"{columns.checksum[row]:08x}"

    def n_item_rows(self, split: Split) -> int:
        """The number of item rows that evaluations of a split refer to; these are numbered from 0, in order."""
        columns = self._splits.get(split)
        return 0 if columns is None else max(columns.item_row, default=_NO_ROW) + 1

    def count(self, status: Status) -> int:
        """The number of evaluations on all splits with this status."""
        code = _STATUSES.index(status)
        return sum(columns.status.count(code) for columns in self._splits.values())

    def __getitem__(self, key: tuple[str, Split]) -> Evaluation:
        identifier, split = key
        columns = self._splits.get(split)
        if columns is None:
            raise KeyError(key)
        row = columns.rows[identifier]
        start = columns.start[row]
        parts: list[dict[str, float]] = []
        for names in self._shapes[columns.shape[row]]:
            parts.append(dict(zip(names, columns.numbers[start : start + len(names)], strict=True)))
            start += len(names)
        status = _STATUSES[columns.status[row]]
        scores, stderr, cost = parts
        return Evaluation(
            identifier, split, status, scores=scores, stderr=stderr, cost=cost, error=columns.errors.get(row)
        )

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, tuple) or len(key) != 2:
            return False
        columns = self._splits.get(key[1])
        return columns is not None and key[0] in columns.rows

    def __iter__(self) -> Iterator[tuple[str, Split]]:
        for split, columns in self._splits.items():
            for identifier in columns.rows:
                yield identifier, split

    def __len__(self) -> int:
        return sum(len(columns.rows) for columns in self._splits.values())
