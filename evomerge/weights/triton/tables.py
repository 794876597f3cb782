"""The tables that tell the kernels what to do, as `evomerge.weights.triton.kernels.merge_chunks` describes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.weights.fused.batch import Part
from evomerge.weights.fused.kernels import BAND, KEEP_ALL, MAGNITUDE, RANDOM, RANKED
from evomerge.weights.fused.norms import addend_grid
from evomerge.weights.fused.steps import Prune
from evomerge.weights.triton.kernels import (
    BLOCK,
    CHUNK_BLOCKS,
    GROUP,
    INPUT_FLOATS,
    INPUT_SCALE,
    INPUT_THRESHOLDS,
    KIND_BITS,
    NO_BASE,
    OUTPUT_FLOATS,
)
from evomerge.weights.triton.resident import Copy, ResidentSources
from evomerge.weights.windows import Window

_WIDE = 16
"""bytes of the widest load and store"""

_NEVER = 2**62
"""a cutoff that no element reaches"""


class Variant(NamedTuple):
    """What a kernel is compiled for, as `kernels.merge_chunks` calls it; parts of one variant are computed by one launch."""

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
    """A part, and the copies that it is computed from."""

    part: Part
    base: Copy | None
    inputs: Sequence[Copy]
    ranks: Sequence[Copy | None]


def row_of(part: Part, resident: ResidentSources) -> Row:
    """`part`, whose sources are held."""
    form, window = part.form, part.destination.window
    base = None if form.base is None else resident.copy(form.base, window)
    inputs = [resident.copy(entry, window) for entry, _, _ in form.inputs]
    ranks = [None if prune.ranks is None else resident.copy(prune.ranks, window) for _, _, prune in form.inputs]
    return Row(part, base, inputs, ranks)


def variant_of(row: Row) -> Variant:
    """What computes `row`."""
    part, form, window = row.part, row.part.form, row.part.destination.window
    kinds = 0
    for position, copy in enumerate(row.inputs):
        kinds |= copy.kind << (KIND_BITS * position)
    mode = max([prune.mode for _, _, prune in form.inputs], default=KEEP_ALL)
    return Variant(
        K=len(row.inputs),
        KINDS=kinds,
        BASE=NO_BASE if row.base is None else row.base.kind,
        OUT=part.destination.kind(),
        MODE=mode,
        ELECT=form.elect_sign,
        NORMALIZE=form.normalize,
        DIVIDE=form.divisor != 1,
        RESCALE=bool(form.norms),
        PRECISION=form.precision,
        ALIGNED=part.address() % _WIDE == 0,
        STRIDED=window.n_stretches > 1 and mode in (RANDOM, RANKED),
    )


def has_groups(window: Window) -> bool:
    """Whether the kernels can tell where in the tensor the window's random numbers lie."""
    edges = (window.start, window.length, window.pitch) if window.n_stretches > 1 else (window.start,)
    return all(edge % GROUP == 0 for edge in edges) and window.n_elements < GROUP << 32


@dataclass(frozen=True, slots=True)
class Tables:
    """One variant's rows.

    Attributes:
        integers, floats: see `kernels.merge_chunks`.
        ranges: (first, end) element of each row, in its window.
    """

    integers: NDArray[np.int64]
    floats: NDArray[np.float32]
    ranges: tuple[tuple[int, int], ...]

    def rescale(self, scales: NDArray[np.float32]) -> None:
        """Sets the scales of all inputs, (rows, inputs)."""
        self.floats[:, OUTPUT_FLOATS + INPUT_SCALE :: INPUT_FLOATS] = scales


def tables_of(rows: Sequence[Row]) -> Tables:
    """The tables of `rows`, which are of one variant. Scales of inputs are 1."""
    integers: list[list[int]] = []
    floats: list[list[float]] = []
    for part, base, inputs, ranks in rows:
        form, window = part.form, part.destination.window
        groups = [edge // GROUP for edge in (window.start, window.length, window.pitch)]
        whole = [part.address(), 0 if base is None else base.address, part.first, part.end, *groups]
        real = [form.divisor, form.scale]
        for position, (_, weight, prune) in enumerate(form.inputs):
            # where others of the variant have ranks and this one has none, the address of anything as long will do: its step is 0
            of_ranks = ranks[position] or inputs[position]
            whole += [inputs[position].address, *_integers(prune, of_ranks.address, window)]
            grid = addend_grid(form.norms[position].whole) if position in form.norms else 0.0
            real += [*_floats(weight, prune), grid]
        integers.append(whole)
        floats.append(real)
    with np.errstate(over="ignore"):  # a weight beyond float32 becomes infinite and is reported with the result
        table = np.array(floats, np.float32)
    of_inputs = table[:, OUTPUT_FLOATS:].reshape(len(rows), len(rows[0].inputs), INPUT_FLOATS)
    for threshold in INPUT_THRESHOLDS:
        of_inputs[..., threshold + 1] = np.nextafter(of_inputs[..., threshold], np.float32(np.inf))
    table[:, OUTPUT_FLOATS:] = of_inputs.reshape(len(rows), len(rows[0].inputs) * INPUT_FLOATS)
    return Tables(np.array(integers, np.int64), table, tuple([(row.part.first, row.part.end) for row in rows]))


# more than the launches of a candidate; crossovers have other ranges each time, and those of 8B parameters take 3 MB of the GPU in all
@lru_cache(maxsize=64)
def chunks_of(ranges: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """(n, 3) int64: row, first block and the block behind the last of every chunk that covers `ranges`."""
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


def _integers(prune: Prune, ranks: int, window: Window) -> list[int]:
    """Cutoff, cutoff of the band's top, largest word whose upper half keeps, ranks, and the key; what does not apply keeps all.

    Cutoffs are elements of the window.
    """
    cutoff = window.place(prune.low.cutoff) if prune.mode in (MAGNITUDE, BAND) else _NEVER
    top = window.place(prune.top.cutoff) if prune.mode == BAND else 0
    last = (max(prune.keep, 1) << 16) - 1 if prune.mode in (RANDOM, RANKED) else 2**32 - 1
    return [cutoff, top, last, ranks, prune.key0, prune.key1]


def _floats(weight: float, prune: Prune) -> list[float]:
    """Weight, thresholds with room for the floats behind them, scale, and the step by rank. An input of which nothing is kept weighs nothing."""
    top = prune.top.threshold if prune.mode == BAND else math.nan
    return [0.0 if prune.keeps_nothing else weight, prune.low.threshold, 0.0, top, 0.0, 1.0, prune.step]
