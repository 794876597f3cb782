"""A strategy's history: the log needed for replay, packed into a few dozen bytes per candidate, and the best results.

Otherwise, a search of 100,000 candidates would hold hundreds of megabytes of dictionaries, tuples and boxed numbers for a
history that is read at most once. Knows nothing of how a strategy proposes or learns.
"""

import base64
import hashlib
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from evomerge.archive import knee_index, non_dominated_mask
from evomerge.core import Candidate, Json, VectorGenome, canonical_json, genome_from_json, genome_to_json
from evomerge.strategy.base import Told, candidate_id

_DIGEST_BYTES = 8
_NONE = float("nan")
"""Marks a result without losses; all other losses are finite."""

_SLACK = 256
"""`BestKnown` removes dominated results when it has doubled plus this many: a few microseconds per result, whatever the front's size."""


class ReplayLog:
    """The seeds, asks and tells of a strategy in order.

    Takes 16 bytes per candidate plus 16 per objective, 8 bytes per call, and the compressed items if they are kept. `records` gives
    the log as JSON: `{"ask": [digest, ...]}`, `{"tell": [result, ...]}`, `{"seed": [result with coordinates, ...]}`; an adopted candidate,
    which differs from the strategy's own proposal, is stored completely: `{"ask": [[genome, parents]]}`.

    Args:
        n_objectives: number of objectives m of every result.
    """

    def __init__(self, n_objectives: int) -> None:
        self._n_objectives = n_objectives
        self._steps = array("l")
        """n > 0: n candidates were asked; n < 0: -n results were told; 0: the next group of seeds"""
        self._digests = bytearray()
        self._adopted: dict[int, list[Json]] = {}
        self._told = array("L")
        self._numbers = array("d")
        self._items: dict[int, bytes] = {}
        self._seeds: list[list[Json]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def n_told(self) -> int:
        """Number of results of proposals."""
        return len(self._told)

    def ask(self, candidates: Sequence[Candidate], *, adopted: bool = False) -> None:
        """Append proposals; the strategy's n-th proposal has the id `candidate_id(n)`. `adopted` ones come from an earlier session."""
        for candidate in candidates:
            if adopted:
                self._adopted[len(self._digests) // _DIGEST_BYTES] = [
                    genome_to_json(candidate.genome),
                    list(candidate.parents),
                ]
            self._digests += _digest(candidate)
        self._steps.append(len(candidates))

    def tell(self, results: Sequence[Told]) -> None:
        """Append results of proposals."""
        for told in results:
            if told.items is not None:
                self._items[len(self._told)] = _deflated(told.items)
            self._told.append(int(told.candidate.id[1:]))
            nothing = (_NONE,) * self._n_objectives
            self._numbers.extend(told.losses or nothing)
            self._numbers.extend(told.stderr or nothing)
        self._steps.append(-len(results))

    def seed(self, results: Sequence[Told]) -> None:
        """Append results of points that were not proposed."""
        entries: list[Json] = []
        for told in results:
            items = None if told.items is None else _deflated(told.items)
            entries.append([*_entry(told.candidate.id, told.losses, told.stderr, items), list(told.candidate.point)])
        self._seeds.append(entries)
        self._steps.append(0)

    def result(self, row: int) -> list[Json]:
        """The `row`-th result of a proposal, counted from 0, in the form of `records`; for `read_result`."""
        start, m = row * 2 * self._n_objectives, self._n_objectives
        losses, stderr = self._numbers[start : start + m], self._numbers[start + m : start + 2 * m]
        known = not np.isnan(losses[0])
        return _entry(
            candidate_id(self._told[row]), losses if known else None, stderr if known else None, self._items.get(row)
        )

    def records(self) -> Iterator[dict[str, Json]]:
        """The whole log as JSON, generated lazily."""
        n_asked = n_told = n_seeds = 0
        for step in self._steps:
            if step > 0:
                yield {"ask": [self._asked(row) for row in range(n_asked, n_asked + step)]}
                n_asked += step
            elif step < 0:
                yield {"tell": [self.result(row) for row in range(n_told, n_told - step)]}
                n_told -= step
            else:
                yield {"seed": list(self._seeds[n_seeds])}
                n_seeds += 1

    def _asked(self, row: int) -> Json:
        return self._adopted.get(row) or self._digests[row * _DIGEST_BYTES : (row + 1) * _DIGEST_BYTES].hex()


class BestKnown:
    """The non-dominated results in order of arrival; of equal results, only the first."""

    def __init__(self) -> None:
        self._losses: list[tuple[float, ...]] = []
        self._candidates: list[Candidate] = []
        self._n_sorted = 0

    def add(self, told: Told) -> None:
        """Add a result; ignored if it has no losses."""
        if told.losses is None:
            return
        self._losses.append(told.losses)
        self._candidates.append(told.candidate)
        if len(self._losses) > 2 * self._n_sorted + _SLACK:
            self._sort_out()

    def best(self) -> Candidate | None:
        """The knee of the front, or the best with one objective; None if there is no result with losses."""
        if not self._losses:
            return None
        self._sort_out()
        return self._candidates[knee_index(np.array(self._losses))]

    def _sort_out(self) -> None:
        first = {losses: row for row, losses in reversed(list(enumerate(self._losses)))}
        rows = sorted(first.values())
        kept = np.array(rows)[non_dominated_mask(np.array([self._losses[row] for row in rows]))]
        self._losses = [self._losses[row] for row in kept]
        self._candidates = [self._candidates[row] for row in kept]
        self._n_sorted = len(kept)


def digest(candidate: Candidate) -> str:
    """16 hexadecimal digits that depend on every bit of the genome and on the parents."""
    return _digest(candidate).hex()


def read_result(candidate: Candidate, entry: Sequence[Json]) -> Told:
    """The result described by an entry of a `tell` or `seed` record.

    Raises:
        IndexError, TypeError, ValueError, zlib.error: the entry is damaged.
    """
    numbers = [None if part is None else tuple(float(x) for x in cast(Sequence[float], part)) for part in entry[1:3]]
    items = None
    if entry[3] is not None:
        items = np.frombuffer(zlib.decompress(base64.b64decode(cast(str, entry[3]), validate=True)), dtype="<f4")
    return Told(candidate, numbers[0], numbers[1], items)


def read_adopted(identifier: str, entry: Sequence[Json]) -> Candidate:
    """The candidate described by a complete entry of an `ask` record. Raises as `read_result` does."""
    return Candidate(identifier, genome_from_json(entry[0]), tuple(cast(Sequence[str], entry[1])))


def read_seed(entry: Sequence[Json]) -> Told:
    """Like `read_result`, for an entry of a `seed` record, which contains the coordinates."""
    values = tuple(float(value) for value in cast(Sequence[float], entry[4]))
    return read_result(Candidate(cast(str, entry[0]), VectorGenome(values)), entry)


def rows_of(record: Mapping[str, Sequence[Json]], kind: str) -> Sequence[Sequence[Json]]:
    """The entries of a `tell` or `seed` record."""
    return cast(Sequence[Sequence[Json]], record[kind])


def _digest(candidate: Candidate) -> bytes:
    genome = candidate.genome
    if isinstance(genome, VectorGenome):
        hasher = hashlib.sha256(struct.pack(f"<{len(genome.values)}d", *genome.values))
    else:
        hasher = hashlib.sha256(canonical_json(genome_to_json(genome)).encode())
    hasher.update("\0".join(candidate.parents).encode())
    return hasher.digest()[:_DIGEST_BYTES]


def _deflated(items: NDArray[np.float32]) -> bytes:
    return zlib.compress(items.astype("<f4").tobytes())


def _entry(
    identifier: str, losses: Sequence[float] | None, stderr: Sequence[float] | None, items: bytes | None
) -> list[Json]:
    """A result as JSON: [id, losses | None, stderr | None, items | None]; items as Base64 of zlib-compressed little-endian float32."""
    return [
        identifier,
        None if losses is None else list(losses),
        None if stderr is None else list(stderr),
        None if items is None else base64.b64encode(items).decode(),
    ]
