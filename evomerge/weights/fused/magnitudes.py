"""Exact k-th largest magnitudes of a delta from a histogram made once.

The upper 16 bits of a float32 magnitude (sign off) order it, so counts of those bins find the bin of the k-th largest for
every k at once. A bin's members are "plain" (no lower bits: all equal, the smallest of the bin) or "mixed". Deltas of
bfloat16 models are plain but for a few percent: the mixed ones are listed and sorted once, and plain ones are counted per
stretch of `STRETCH` elements, which says where the k-th of equal magnitudes stands (the first in flat order are kept).
Where most are mixed (float32 models), a bin's members are collected and sorted when first asked for.
"""

from collections import OrderedDict
from typing import NamedTuple

import numba
import numpy as np
import torch

from evomerge.weights.fused.blocks import BLOCK, F32, load_delta
from evomerge.weights.fused.tables import delta_of

STRETCH = 20 * BLOCK
"""elements per row of counts: below 2^16, so a count fits 16 bits; smaller ones are searched faster and take more memory"""

_LISTED_SHARE = 1 / 8
"""mixed deltas are listed (8 bytes each) up to this share of a tensor"""

_KEPT_BINS = 8
"""bins whose sorted mixed members are remembered per tensor where they are not all listed"""

INDEX_BITS = 33
"""of a key `(2^31 - 1 - magnitude bits) << 33 | flat index`: ascending keys are descending magnitudes, then ascending indices"""


class Cut(NamedTuple):
    """Keep |d| > threshold, and |d| == threshold before flat index `cutoff`."""

    threshold: float
    cutoff: int


class MagnitudeHistogram:
    """Answers "which magnitude and index separate the k largest entries of `tensor - base`" for any k.

    Args:
        base, tensor: of one shape, contiguous, on the CPU, of a dtype in `KINDS`.
        precision: the kind that both and their delta are rounded to.
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

    def cut(self, k: int) -> Cut:
        """What separates the `k` largest magnitudes; of equal ones the first count as larger. Zeros may be kept or not."""
        n_nonzero = int(self._from_top[-1]) if len(self._from_top) else 0
        if k >= n_nonzero:
            return Cut(0.0, self.n_elements)
        if k <= 0:
            return Cut(float("inf"), 0)
        place = int(np.searchsorted(self._from_top, k))
        column = len(self._from_top) - 1 - place
        rank = k - (int(self._from_top[place - 1]) if place else 0)
        if rank <= self._mixed[column]:
            return cut_at(self._mixed_key(place, column, rank))
        threshold = value_of((self._low + column) << 16)
        if k == self._from_top[place]:
            return Cut(threshold, self.n_elements)
        rank -= int(self._mixed[column])
        return Cut(threshold, int(_nth_plain(self._delta, self.n_elements, self._low, column, rank, self._counts)) + 1)

    def _mixed_key(self, place: int, column: int, rank: int) -> int:
        """The key of the `rank`-th (from 1) mixed member of a bin."""
        if self._listed is not None:
            before = int(self._mixed_from_top[place - 1]) if place else 0
            return int(self._listed[before + rank - 1])
        members = self._members.get(column)
        if members is None:
            members = self._mixed_keys(self._low + column, self._low + column, int(self._mixed[column]))
            self._members[column] = members
            if len(self._members) > _KEPT_BINS:
                self._members.popitem(last=False)
        return int(members[rank - 1])

    def _mixed_keys(self, low_bin: int, high_bin: int, n_members: int) -> np.ndarray:
        """Sorted keys of the mixed members of these bins and those between."""
        low, high = np.uint32(max(low_bin, 0) << 16), np.uint32(max(high_bin, 0) << 16 | 0xFFFF)
        members: np.ndarray = collect(self._delta, self.n_elements, low, high, np.uint32(1), n_members)
        members.sort()
        return members


def cut_at(key: int) -> Cut:
    """The cut that keeps the element with this key and all before it."""
    return Cut(value_of(0x7FFFFFFF - (key >> INDEX_BITS)), (key & ((1 << INDEX_BITS) - 1)) + 1)


def value_of(bits: int) -> float:
    """The float32 with this pattern."""
    return float(np.uint32(bits).view(np.float32))


@numba.njit(cache=True, nogil=True)
def delta_bits(delta, start, count, base, bits):  # type: ignore[no-untyped-def]
    """Magnitude bits of elements [start, start + count) of a `Delta` into `bits`; `base` is scratch, of float32."""
    load_delta(delta, start, count, base, bits.view(np.float32))
    for i in range(count):
        bits[i] &= np.uint32(0x7FFFFFFF)


@numba.njit(cache=True, nogil=True)
def _bin_range(delta, n_elements):  # type: ignore[no-untyped-def]
    """Lowest and highest bin of the non-zero deltas; (0, -1) where all are zero."""
    base, bits = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    lowest, highest = np.uint32(0xFFFFFFFF), np.uint32(0)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        delta_bits(delta, start, count, base, bits)
        for i in range(count):
            # zero wraps around to the largest number and is never the lowest
            lowest = min(lowest, bits[i] - np.uint32(1))
            highest = max(highest, bits[i])
    if highest == 0:
        return np.int64(0), np.int64(-1)
    return np.int64(lowest + np.uint32(1)) >> 16, np.int64(highest) >> 16


@numba.njit(cache=True, nogil=True)
def _count(delta, n_elements, low, counts, mixed):  # type: ignore[no-untyped-def]
    """Counts plain non-zero deltas per stretch and bin, and mixed ones per bin."""
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
def _nth_plain(delta, n_elements, low, column, rank, counts):  # type: ignore[no-untyped-def]
    """Flat index of the `rank`-th (from 1) plain element of a bin."""
    row = 0
    while rank > counts[row, column]:
        rank -= np.int64(counts[row, column])
        row += 1
    wanted = np.uint32((low + column) << 16)
    return nth_equal(delta, n_elements, row * STRETCH, wanted, rank)


@numba.njit(cache=True, nogil=True)
def nth_equal(delta, n_elements, first, wanted, rank):  # type: ignore[no-untyped-def]
    """Flat index of the `rank`-th (from 1) element from `first` on whose magnitude bits are `wanted`; there must be one."""
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
    """Keys of the `n_members` elements with magnitude bits in [low, high], of which the lower 16 are at least `least_lower`, in flat order."""
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
