"""The tables that drive the kernels, as described in `evomerge.weights.triton.kernels.merge_chunks`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.weights.fused.batch import Part
from evomerge.weights.fused.kernels import BAND, KEEP_ALL, MAGNITUDE, RANDOM, RANKED
from evomerge.weights.fused.norms import addend_grid
from evomerge.weights.triton.kernels import (
    BLOCK,
    CHUNK_BLOCKS,
    GROUP,
    INPUT_FLOATS,
    INPUT_SCALE,
    INPUT_THRESHOLDS,
    NO_BASE,
    OUTPUT_FLOATS,
)
from evomerge.weights.triton.resident import Held, ResidentSources
from evomerge.weights.windows import Window, places_in

_WIDE = 16
"""bytes of the widest load and store"""

_NEVER = 2**62
"""a cutoff that no element reaches"""


class Variant(NamedTuple):
    """The compile-time constants of a kernel, see `kernels.merge_chunks`; parts of the same variant are computed in one launch."""

    K: int
    KINDS: int
    BASE: int
    OUT: int
    MODE: int
    ELECT: bool
    NORMALIZE: bool
    DIVIDE: bool
    RESCALE: bool
    PRECISION: int
    ALIGNED: bool
    STRIDED: bool


class Row(NamedTuple):
    """A part, the address of its destination, and the copies from which it is computed."""

    part: Part
    address: int
    held: Held


def row_of(part: Part, resident: ResidentSources) -> Row:
    """The row for `part`, whose sources must have been copied."""
    return Row(part, part.address(), resident.read(part.form, part.destination.window))


def variant_of(row: Row) -> Variant:
    """The variant that computes `row`."""
    part, address, held = row
    form, window = part.form, part.destination.window
    mode = max([prune.mode for _, _, prune in form.inputs], default=KEEP_ALL)
    return Variant(
        K=len(held.inputs),
        KINDS=held.kinds,
        BASE=NO_BASE if held.base is None else held.base.kind,
        OUT=part.destination.kind(),
        MODE=mode,
        ELECT=form.elect_sign,
        NORMALIZE=form.normalize,
        DIVIDE=form.divisor != 1,
        RESCALE=bool(form.norms),
        PRECISION=form.precision,
        ALIGNED=address % _WIDE == 0,
        STRIDED=window.n_stretches > 1 and mode in (RANDOM, RANKED),
    )


def has_groups(window: Window) -> bool:
    """Whether the window consists of whole groups, so that the kernels can compute its random numbers."""
    start, length, pitch, n_stretches = window
    if start % GROUP or (n_stretches > 1 and (length % GROUP or pitch % GROUP)):
        return False
    return window.n_elements < GROUP << 32


@dataclass(frozen=True, slots=True)
class Tables:
    """One variant's rows.

    Attributes:
        integers, floats: see `kernels.merge_chunks`.
        ranges: (first, end) elements of each row, within its window.
    """

    integers: NDArray[np.int64]
    floats: NDArray[np.float32]
    ranges: tuple[tuple[int, int], ...]

    def rescale(self, scales: NDArray[np.float32]) -> None:
        """Set the scales of all inputs, (rows, inputs)."""
        self.floats[:, OUTPUT_FLOATS + INPUT_SCALE :: INPUT_FLOATS] = scales


def tables_of(rows: Sequence[Row], variant: Variant) -> Tables:
    """The tables of `rows`, all of this variant. Scales of inputs are 1."""
    windows = np.array([row.part.destination.window for row in rows], np.int64)
    ranges = tuple([(row.part.first, row.part.end) for row in rows])
    addresses = [(row.address, 0 if row.held.base is None else row.held.base.address) for row in rows]
    factors = np.array([(row.part.form.divisor, row.part.form.scale) for row in rows])
    integers, floats = _of_inputs(rows, variant, windows)
    with np.errstate(over="ignore"):  # a weight beyond float32 becomes infinite and is reported with the result
        real = np.concatenate([factors, floats], axis=1).astype(np.float32)
    of_inputs = real[:, OUTPUT_FLOATS:].reshape(len(rows), variant.K, INPUT_FLOATS)
    for threshold in INPUT_THRESHOLDS:
        of_inputs[..., threshold + 1] = np.nextafter(of_inputs[..., threshold], np.float32(np.inf))
    real[:, OUTPUT_FLOATS:] = of_inputs.reshape(len(rows), -1)
    return Tables(np.concatenate([addresses, ranges, windows[:, :3] // GROUP, integers], axis=1), real, ranges)


def _of_inputs(
    rows: Sequence[Row], variant: Variant, windows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The columns of the inputs, (rows, K * INPUT_INTEGERS) and (rows, K * INPUT_FLOATS); cutoffs are relative to the window.

    Settings that do not apply to an input have values that keep everything. The floats that follow thresholds are filled in by the caller.
    """
    prunes = [prune for row in rows for _, _, prune in row.part.form.inputs]

    def column(values: Sequence[float]) -> NDArray[Any]:
        return np.array(values).reshape(len(rows), variant.K)

    address = column([copy.address for row in rows for copy in row.held.inputs])
    weight = column([weight for row in rows for _, weight, _ in row.part.form.inputs])
    nothing, kept = np.zeros_like(address), np.full_like(address, 2**32 - 1)
    cutoff, top_cutoff, last, key0, key1 = np.full_like(address, _NEVER), nothing, kept, nothing, nothing
    threshold, top, step, grid = (np.full(address.shape, value) for value in (0.0, math.nan, 0.0, 0.0))
    # if other rows of the variant have ranks and this one has none, any address of the same length will do, because its step is 0
    ranks = address
    mode = column([prune.mode for prune in prunes])
    if variant.MODE in (MAGNITUDE, BAND):
        threshold = column([prune.low.threshold for prune in prunes])
        places = places_in(windows[:, None], column([prune.low.cutoff for prune in prunes]))
        cutoff = np.where(mode == KEEP_ALL, _NEVER, places)
    if variant.MODE == BAND:
        top = np.where(mode == BAND, column([prune.top.threshold for prune in prunes]), math.nan)
        places = places_in(windows[:, None], column([prune.top.cutoff for prune in prunes]))
        top_cutoff = np.where(mode == BAND, places, 0)
    if variant.MODE in (RANDOM, RANKED):
        keep = np.maximum(column([prune.keep for prune in prunes]), 1)
        last = np.where(mode == KEEP_ALL, kept, (keep << 16) - 1)
        key0, key1 = column([prune.key0 for prune in prunes]), column([prune.key1 for prune in prunes])
        weight = np.where(column([prune.keeps_nothing for prune in prunes]), 0.0, weight)
    if variant.MODE == RANKED:
        given = column([0 if copy is None else copy.address for row in rows for copy in row.held.ranks])
        ranks, step = np.where(given, given, address), column([prune.step for prune in prunes])
    if variant.RESCALE:
        norms = [row.part.form.norms for row in rows]
        grid = column([addend_grid(own[k].whole) if k in own else 0.0 for own in norms for k in range(variant.K)])
    integers = np.stack([address, cutoff, top_cutoff, last, ranks, key0, key1], axis=2)
    floats = np.stack([weight, threshold, threshold, top, top, np.ones(address.shape), step, grid], axis=2)
    return integers.reshape(len(rows), -1), floats.reshape(len(rows), -1)


# more entries than launches per candidate; crossovers have new ranges each time, and those of 8B parameters take 3 MB of GPU memory in total
@lru_cache(maxsize=64)
def chunks_of(ranges: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """(n, 3) int64: row, first block, and block after the last, of every chunk that covers `ranges`."""
    bounds = np.array(ranges, np.int64).reshape(-1, 2)
    first_block, end_block = bounds[:, 0] // BLOCK, -(-bounds[:, 1] // BLOCK)
    end_block = np.where(bounds[:, 0] == bounds[:, 1], first_block, end_block)
    first_chunk = first_block // CHUNK_BLOCKS
    n_chunks = np.where(first_block == end_block, 0, -(-end_block // CHUNK_BLOCKS) - first_chunk)
    rows = np.repeat(np.arange(len(bounds)), n_chunks)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks) + first_chunk[rows]
    chunks = np.empty((len(rows), 3), np.int64)
    chunks[:, 0] = rows
    chunks[:, 1] = np.maximum(number * CHUNK_BLOCKS, first_block[rows])
    chunks[:, 2] = np.minimum((number + 1) * CHUNK_BLOCKS, end_block[rows])
    return torch.from_numpy(chunks).to(device, non_blocking=True)
