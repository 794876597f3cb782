"""Exact k-th largest magnitudes of a delta, from a histogram that is built once.

The upper 16 bits of a float32 magnitude (without sign) define ordered bins, so the counts of these bins give the bin of the k-th largest
for every k at once. A bin's members are "plain" (lower bits zero, so all equal and the smallest of the bin) or "mixed". Deltas of
bfloat16 models are plain except for a few percent: the mixed ones are listed and sorted once, and plain ones are counted per
stretch of `STRETCH` elements, which gives the position of the k-th of equal magnitudes (the first in flat order are kept).
If most are mixed (float32 models), a bin's members are collected and sorted when first needed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch

from evomerge.weights.fused.blocks import BLOCK, F32, as_float, load_delta, pointer
from evomerge.weights.fused.tables import delta_of
from evomerge.weights.fused.threads import Threads

STRETCH = 20 * BLOCK
"""elements per row of counts: below 2^16, so that a count fits in 16 bits; smaller values are faster to search but take more memory"""

_LISTED_SHARE = 1 / 8
"""mixed deltas are listed (8 bytes each) if they make up at most this fraction of a tensor"""

_KEPT_BINS = 8
"""number of bins per tensor whose sorted mixed members are cached if not all are listed"""

_REMEMBERED_CUTS = 64
"""number of cuts cached per histogram; a search with fixed densities asks for the same ones repeatedly"""

_FEW_QUESTIONS = 32
"""fewer questions are answered by one thread: each takes a few microseconds, about as long as starting a thread's work"""

INDEX_BITS = 33
"""number of index bits in a key `(2^31 - 1 - magnitude bits) << 33 | flat index`: ascending keys mean descending magnitudes, then ascending indices"""


@dataclass(slots=True)
class Cut:
    """Keep |d| > threshold, and |d| == threshold before flat index `cutoff`."""

    threshold: float
    cutoff: int

    @classmethod
    def unknown(cls) -> "Cut":
        """An uninitialised cut, whose fields are set by `find_cuts`."""
        return cls.__new__(cls)


_QUESTION = np.dtype(
    [
        ("k", np.int64),
        ("cutoff", np.int64),  # -1 where only the members of the bin can tell
        ("column", np.int64),  # the bin, and which of its mixed members
        ("rank", np.int64),
        ("threshold", np.float32),
        ("base_address", np.int64),
        ("address", np.int64),
        ("n_elements", np.int64),
        ("low", np.int64),  # the lowest bin
        ("n_bins", np.int64),
        ("from_top", np.int64),  # addresses of the histogram's arrays
        ("counts", np.int64),
        ("mixed", np.int64),
        ("mixed_from_top", np.int64),
        ("listed", np.int64),  # 0 where there is no list
        ("base_kind", np.int32),
        ("kind", np.int32),
        ("precision", np.int32),
    ],
    align=True,
)
"""a k, the results for it, and the addresses through which compiled code reads its histogram"""


class MagnitudeHistogram:
    """Answers "which magnitude and index separate the k largest entries of `tensor - base`" for any k.

    Args:
        base, tensor: of the same shape, contiguous, on the CPU, with a dtype in `KINDS`.
        precision: the kind to which both and their delta are rounded.
    """

    def __init__(self, base: torch.Tensor, tensor: torch.Tensor, precision: int = F32) -> None:
        self._delta = delta_of(base, tensor, precision)
        self._held = (base, tensor)
        self.n_elements = tensor.numel()
        low, high = _bin_range(self._delta, self.n_elements)
        self._low = low
        n_bins = max(high - low + 1, 0)
        self._counts = np.zeros((-(-self.n_elements // STRETCH), n_bins), np.uint16)
        self._mixed = np.zeros(n_bins, np.int64)
        _count(self._delta, self.n_elements, low, self._counts, self._mixed)
        plain = self._counts.sum(axis=0, dtype=np.int64)
        # elements in this bin or a higher one, for each bin from the highest down
        self._from_top = np.cumsum((plain + self._mixed)[::-1])
        self._mixed_from_top = np.cumsum(self._mixed[::-1])
        self._members: OrderedDict[int, np.ndarray] = OrderedDict()
        n_mixed = int(self._mixed.sum())
        self._listed = self._mixed_keys(low, high, n_mixed) if n_mixed <= _LISTED_SHARE * self.n_elements else None
        self.question = self._question()
        self._known: dict[int, Cut] = {}

    def cut(self, k: int) -> tuple[Cut, bool]:
        """The cut after the `k` largest, and whether it is new, so that it must be passed to `find_cuts`."""
        known = self._known.get(k)
        if known is not None:
            return known, False
        if len(self._known) >= _REMEMBERED_CUTS:
            self._known.clear()
        self._known[k] = cut = Cut.unknown()
        return cut, True

    def _question(self) -> bytes:
        """A `_QUESTION` about this histogram, without a k."""
        row = np.zeros(1, _QUESTION)
        row["base_address"], row["base_kind"], row["address"], row["kind"], row["precision"] = self._delta
        row["n_elements"], row["low"], row["n_bins"] = self.n_elements, self._low, len(self._from_top)
        for name in ("from_top", "counts", "mixed", "mixed_from_top"):
            row[name] = getattr(self, f"_{name}").ctypes.data
        row["listed"] = 0 if self._listed is None else self._listed.ctypes.data
        return row.tobytes()

    def at_member(self, column: int, rank: int) -> Cut:
        """The cut after the `rank`-th (from 1) mixed member of a bin whose members are not listed."""
        members = self._members.get(column)
        if members is None:
            members = self._mixed_keys(self._low + column, self._low + column, int(self._mixed[column]))
            self._members[column] = members
            if len(self._members) > _KEPT_BINS:
                self._members.popitem(last=False)
        return cut_at(int(members[rank - 1]))

    def _mixed_keys(self, low_bin: int, high_bin: int, n_members: int) -> np.ndarray:
        """Sorted keys of the mixed members of the bins from `low_bin` to `high_bin`."""
        low, high = np.uint32(max(low_bin, 0) << 16), np.uint32(max(high_bin, 0) << 16 | 0xFFFF)
        members: np.ndarray = collect(self._delta, self.n_elements, low, high, np.uint32(1), n_members)
        members.sort()
        return members


def find_cuts(asked: Sequence[tuple[MagnitudeHistogram, int, Cut]], threads: Threads) -> None:
    """Given (histogram, k, cut), sets every cut such that it separates the k largest magnitudes; of equal ones, the first count as larger.

    Zeros may be kept or dropped.
    """
    # numpy joins arrays of structures field by field, ten times slower
    questions = np.frombuffer(bytearray().join([histogram.question for histogram, _, _ in asked]), _QUESTION)
    questions["k"] = [k for _, k, _ in asked]
    if len(questions) < _FEW_QUESTIONS:
        _answer(questions)
    else:
        threads.map(_answer, np.array_split(questions, threads.count))
    for (_, _, cut), threshold, cutoff in zip(
        asked, questions["threshold"].tolist(), questions["cutoff"].tolist(), strict=True
    ):
        cut.threshold, cut.cutoff = threshold, cutoff

    def look_up(number: int) -> None:
        histogram, _, cut = asked[number]
        at = histogram.at_member(int(questions["column"][number]), int(questions["rank"][number]))
        cut.threshold, cut.cutoff = at.threshold, at.cutoff

    unlisted = np.flatnonzero(questions["cutoff"] < 0).tolist()
    if unlisted:
        threads.map(look_up, unlisted)


def cut_at(key: int) -> Cut:
    """The cut that keeps the element with this key and all with smaller keys."""
    return Cut(value_of(0x7FFFFFFF - (key >> INDEX_BITS)), (key & ((1 << INDEX_BITS) - 1)) + 1)


def value_of(bits: int) -> float:
    """The float32 with these bits."""
    return float(np.uint32(bits).view(np.float32))


@numba.njit(cache=True, nogil=True)
def delta_bits(delta, start, count, base, bits):  # type: ignore[no-untyped-def]
    """Write the magnitude bits of elements [start, start + count) of a `Delta` into `bits`; `base` is a float32 scratch array."""
    load_delta(delta, start, count, base, bits.view(np.float32))
    for i in range(count):
        bits[i] &= np.uint32(0x7FFFFFFF)


@numba.njit(cache=True, nogil=True)
def _bin_range(delta, n_elements):  # type: ignore[no-untyped-def]
    """Lowest and highest bin of the nonzero deltas; (0, -1) if all are zero."""
    base, bits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    lowest, highest = np.uint32(0xFFFFFFFF), np.uint32(0)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        delta_bits(delta, start, count, base, bits)
        for i in range(count):
            # zero wraps around to the largest number, so it is never the lowest
            lowest = min(lowest, bits[i] - np.uint32(1))
            highest = max(highest, bits[i])
    if highest == 0:
        return np.int64(0), np.int64(-1)
    return np.int64(lowest + np.uint32(1)) >> 16, np.int64(highest) >> 16


@numba.njit(cache=True, nogil=True)
def _count(delta, n_elements, low, counts, mixed):  # type: ignore[no-untyped-def]
    """Count plain nonzero deltas per stretch and bin, and mixed ones per bin."""
    base, bits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        delta_bits(delta, start, count, base, bits)
        row = start // STRETCH
        for i in range(count):
            if bits[i] != 0:
                column = np.int64(bits[i] >> np.uint32(16)) - low
                if bits[i] & np.uint32(0xFFFF):
                    mixed[column] += 1
                else:
                    counts[row, column] += np.uint16(1)


@numba.njit(cache=True, nogil=True)
def nth_equal(delta, n_elements, first, wanted, rank):  # type: ignore[no-untyped-def]
    """Flat index of the `rank`-th (from 1) element at or after `first` whose magnitude bits are `wanted`; it must exist."""
    base, bits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    for start in range(first, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        delta_bits(delta, start, count, base, bits)
        inside = 0
        for i in range(count):
            inside += bits[i] == wanted
        if inside < rank:
            rank -= inside
            continue
        for i in range(count):
            rank -= bits[i] == wanted
            if rank == 0:
                return start + i
    return n_elements - 1


@numba.njit(cache=True, nogil=True)
def collect(delta, n_elements, low, high, least_lower, n_members):  # type: ignore[no-untyped-def]
    """Keys, in flat order, of the `n_members` elements with magnitude bits in [low, high] whose lower 16 bits are at least `least_lower`."""
    base, bits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    keys = np.empty(n_members, np.uint64)
    found = 0
    for start in range(0, n_elements, BLOCK):
        if found == n_members:
            break
        count = min(BLOCK, n_elements - start)
        delta_bits(delta, start, count, base, bits)
        for i in range(count):
            if bits[i] & np.uint32(0xFFFF) >= least_lower and low <= bits[i] <= high:
                descending = np.uint64(0x7FFFFFFF) - np.uint64(bits[i])
                keys[found] = (descending << np.uint64(INDEX_BITS)) | np.uint64(start + i)
                found += 1
    return keys


@numba.njit(cache=True, nogil=True)
def _answer(questions):  # type: ignore[no-untyped-def]
    """Find threshold and cutoff for every `_QUESTION`."""
    for i in range(questions.shape[0]):
        question = questions[i]
        n_elements, n_bins, rank = question["n_elements"], question["n_bins"], question["k"]
        from_top = numba.carray(pointer(question["from_top"]), n_bins, np.int64)
        question["threshold"], question["cutoff"] = np.float32(0.0), n_elements
        if n_bins == 0 or rank >= from_top[n_bins - 1]:
            continue
        if rank <= 0:
            question["threshold"], question["cutoff"] = np.float32(np.inf), 0
            continue
        place = np.searchsorted(from_top, rank)
        column = n_bins - 1 - place
        bits = np.uint32((question["low"] + column) << 16)
        question["threshold"] = as_float(bits)
        if rank == from_top[place]:
            continue  # the whole bin is kept
        above = from_top[place - 1] if place > 0 else 0
        n_mixed = numba.carray(pointer(question["mixed"]), n_bins, np.int64)[column]
        rank -= above
        if rank > n_mixed:
            question["cutoff"] = _nth_plain(question, column, bits, rank - n_mixed) + 1
        elif question["listed"] == 0:
            question["column"], question["rank"], question["cutoff"] = column, rank, -1
        else:
            mixed_from_top = numba.carray(pointer(question["mixed_from_top"]), n_bins, np.int64)
            rank += mixed_from_top[place - 1] if place > 0 else 0
            key = numba.carray(pointer(question["listed"]), rank, np.uint64)[rank - 1]
            question["threshold"] = as_float(np.uint32(0x7FFFFFFF) - np.uint32(key >> np.uint64(INDEX_BITS)))
            question["cutoff"] = np.int64(key & np.uint64((1 << INDEX_BITS) - 1)) + 1


@numba.njit(cache=True, nogil=True)
def _nth_plain(question, column, bits, rank):  # type: ignore[no-untyped-def]
    """Flat index of the `rank`-th (from 1) plain element of a bin; plain elements have the magnitude bits `bits`."""
    n_elements = question["n_elements"]
    shape = (n_elements + STRETCH - 1) // STRETCH, question["n_bins"]
    counts = numba.carray(pointer(question["counts"]), shape, np.uint16)
    row = 0
    while rank > counts[row, column]:
        rank -= np.int64(counts[row, column])
        row += 1
    base, tensor = (question["base_address"], question["base_kind"]), (question["address"], question["kind"])
    return nth_equal((*base, *tensor, question["precision"]), n_elements, row * STRETCH, bits, rank)
