"""What a run remembers of every candidate, packed: two mappings that make their records when they are looked up.

A run of 100,000 candidates stays below the size of its item matrix; plain records in dictionaries take ten times as much.
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
        id: unique in the run; baselines are called `source:<name>`, `uniform`, `task_arithmetic:<weight>`, `recipe:<file>`.
        genome: as it was proposed; None for a baseline outside the space.
        parents: ids it was made from.
        recipe: a baseline's recipe as JSON; None where it follows from the genome.
        baseline: whether it is a baseline.
        factors: what a crossover's parents are multiplied by (docs/journal.md); None where that is not recorded.
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
        """As strategies know it.

        Raises:
            JournalError: it has no genome.
        """
        if self.genome is None:
            raise JournalError(f"{self.id} is not a point of the search space")
        return Candidate(self.id, self.genome, self.parents)


class EntryTable(Mapping[str, Entry]):
    """Candidates by id, in the order they were added. Looking one up makes a new, equal `Entry`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._index: dict[str, int] = {}
        self._genomes: list[bytes | Genome | None] = []
        self._parents: list[tuple[str, ...]] = []
        self._baselines: dict[str, Mapping[str, Json] | None] = {}
        self._factors: dict[str, bytes] = {}

    def add(self, entry: Entry) -> None:
        """Appends an entry.

        Raises:
            JournalError: its id is taken.
        """
        if entry.id in self._index:
            raise JournalError(f"candidate {entry.id} stands twice in the journal")
        self._index[entry.id] = len(self._names)
        self._names.append(entry.id)
        values = entry.values
        self._genomes.append(entry.genome if values is None else array("d", values).tobytes())
        self._parents.append(tuple(self.name(parent) for parent in entry.parents))
        if entry.baseline:
            self._baselines[entry.id] = entry.recipe

    def add_factors(self, identifier: str, factors: Sequence[float]) -> None:
        """Takes in what the parents of a crossover are multiplied by.

        Raises:
            JournalError: there is no such candidate.
        """
        if identifier not in self._index:
            raise JournalError(f"factors of {identifier}, which has not been asked")
        self._factors[self.name(identifier)] = array("d", factors).tobytes()

    def name(self, identifier: str) -> str:
        """The one string object that stands for `identifier` in the whole run."""
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
    """The evaluations of one split, a row each; `numbers` holds scores, standard errors and costs, named by `shape`."""

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
    """(id, split) -> evaluation without item scores, split after split, in the order they were added."""

    def __init__(self) -> None:
        self._splits: dict[Split, _Columns] = {}
        self._shapes: list[_Shape] = []
        self._shape_index: dict[_Shape, int] = {}

    def add(self, evaluation: Evaluation, place: tuple[int, str] | None) -> None:
        """Appends an evaluation and where its item scores are: (row, checksum) in the item store, or None.

        Raises:
            JournalError: there is one of this candidate on this split.
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
        """Forgets an evaluation that has no item scores."""
        columns = self._splits[split]
        row = columns.rows.pop(identifier)
        columns.status[row] = _DROPPED
        columns.errors.pop(row, None)

    def status(self, identifier: str, split: Split) -> Status | None:
        """How an evaluation ended; None where there is none."""
        columns = self._splits.get(split)
        row = None if columns is None else columns.rows.get(identifier)
        return None if columns is None or row is None else _STATUSES[columns.status[row]]

    def place(self, identifier: str, split: Split) -> tuple[int, str] | None:
        """(row, checksum) of its item scores; None where it has none."""
        columns = self._splits.get(split)
        row = None if columns is None else columns.rows.get(identifier)
        if columns is None or row is None or columns.item_row[row] == _NO_ROW:
            return None
        return columns.item_row[row], f"{columns.checksum[row]:08x}"

    def n_item_rows(self, split: Split) -> int:
        """How many item rows of a split its evaluations name; they name them from 0 on, in order."""
        columns = self._splits.get(split)
        return 0 if columns is None else max(columns.item_row, default=_NO_ROW) + 1

    def count(self, status: Status) -> int:
        """How many evaluations, all splits together, ended so."""
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
