"""Batches of children of the digits perceptron, in compiled code: crossed, mutated and evaluated, each on its own core.

Three things make it fast. Half of all pixels are 0 and skipped. The first layer's weights are processed 64 hidden units at a time, so
that they stay in the first-level cache while their sums stay in registers. And a child is given up as soon as it can no longer enter
the archive (`Niches.stakes`): items that its parents fail come first, and among these the ones that few members solve.
"""

from typing import NamedTuple

import numba
import numpy as np
from digits_perceptron import N_WEIGHTS, Floats, digits
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from evomerge.archive import Niches

_ANY_ORDER = {"contract", "nsz", "reassoc"}
"""for sums, so that they can be vectorised"""
_UNITS = 64
"""hidden units at a time; with 64 pixels they take 16 KB of weights"""
_BLOCK = 32
"""items between two checks of whether the child can still enter"""
_ROUNDING = 1e-9
"""tolerance in fitness; a child this close to entering is evaluated to the end"""

_LANES = ir.VectorType(ir.FloatType(), 16)


@numba.njit(cache=True)
def arc(mix, cosine):
    """SLERP's factors for both vectors; LERP's if they are nearly parallel."""
    angle = np.arccos(min(max(cosine, -1.0), 1.0))
    sine = np.sin(angle)
    return (1.0 - mix, mix) if sine <= 1e-6 else (np.sin((1.0 - mix) * angle) / sine, np.sin(mix * angle) / sine)


def _load(builder, address, offset, kind):
    pointer = builder.inttoptr(builder.add(address, offset), kind.as_pointer())
    return builder.load(pointer, align=4)


def _store(builder, value, address, offset):
    pointer = builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), value.type.as_pointer())
    builder.store(value, pointer, align=4)


def _multiply_add(builder, a, b, total):
    """Adds a * b to the value that `total` points at, in one instruction."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


@intrinsic
def _hidden_units(typing_context, first, bias, pixels, values, start, stop, hidden):
    """64 hidden units of one image before the threshold: bias + sum over its lit pixels. All arguments except two are addresses."""

    def generate(context, builder, signature, arguments):
        first, bias, pixels, values, start, stop, hidden = arguments
        word = first.type
        sums = [cgutils.alloca_once(builder, _LANES) for _ in range(_UNITS // 16)]
        for n, total in enumerate(sums):
            builder.store(_load(builder, bias, ir.Constant(word, 64 * n), _LANES), total)
        with cgutils.for_range_slice(builder, start, stop, ir.Constant(word, 1), word) as (position, _):
            offset = builder.mul(position, ir.Constant(word, 4))
            value = _load(builder, values, offset, ir.FloatType())
            lit = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
            lit = builder.shuffle_vector(lit, lit, ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16))
            pixel = builder.zext(_load(builder, pixels, offset, ir.IntType(32)), word)
            row = builder.add(first, builder.mul(pixel, ir.Constant(word, 4 * _UNITS)))
            for n, total in enumerate(sums):
                weights = _load(builder, row, ir.Constant(word, 64 * n), _LANES)
                _multiply_add(builder, lit, weights, total)
        for n, total in enumerate(sums):
            _store(builder, builder.load(total), hidden, 64 * n)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic
def _ten_classes(typing_context, hidden, second, logits):
    """The logits of one image, without the last bias, from its hidden units before the threshold. Arguments are addresses."""

    def generate(context, builder, signature, arguments):
        hidden, second, logits = arguments
        word, scalar = hidden.type, ir.FloatType()
        zero = ir.Constant(_LANES, [0.0] * 16)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(10)]
        bounds = (ir.Constant(word, number) for number in (0, 1024, 64))
        with cgutils.for_range_slice(builder, *bounds, word) as (offset, _):
            units = _load(builder, hidden, offset, _LANES)
            active = builder.select(builder.fcmp_ordered(">", units, zero), units, zero)
            for n, total in enumerate(sums):
                weights = _load(builder, second, builder.add(offset, ir.Constant(word, 1024 * n)), _LANES)
                _multiply_add(builder, active, weights, total)
        kind = ir.FunctionType(scalar, [scalar, _LANES])
        add_up = builder.module.declare_intrinsic("llvm.vector.reduce.fadd.v16f32", (), kind)
        for n, total in enumerate(sums):
            lanes = [ir.Constant(scalar, 0.0), builder.load(total)]
            _store(builder, builder.call(add_up, lanes, fastmath=("reassoc",)), logits, 4 * n)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@numba.njit(cache=True, nogil=True)
def _aligned(rows, columns):
    """(rows, columns) float32, starting at a cache line; vectors that straddle two lines load at half the speed."""
    memory = np.empty(rows * columns + 16, np.float32)
    skipped = -(memory.ctypes.data // 4) % 16
    return memory[skipped : skipped + rows * columns].reshape(rows, columns)


@numba.njit(cache=True, nogil=True, fastmath=_ANY_ORDER)
def _race(weights, images, labels, credit, cost, order, right):
    """Evaluates until the child has lost; items not evaluated count as solved in `right`. Returns how many were evaluated."""
    starts, pixels, values = images
    first, second, hidden = _aligned(4 * 64, _UNITS), _aligned(10, 256), _aligned(_BLOCK, 256)
    for part in range(4):
        for pixel in range(64):
            for unit in range(_UNITS):
                first[64 * part + pixel, unit] = weights[256 * pixel + _UNITS * part + unit]
    second[:] = weights[16640:19200].reshape(256, 10).T
    bias, last, logits, credit = weights[16384:16640], weights[19200:], np.empty(10, np.float32), credit.copy()
    right[:] = True
    seen = 0
    while seen < len(order) and credit.max() > -_ROUNDING:
        block = order[seen : seen + _BLOCK]
        for part in range(4):
            for row, item in enumerate(block):
                _hidden_units(
                    first[64 * part].ctypes.data,
                    bias[_UNITS * part :].ctypes.data,
                    pixels.ctypes.data,
                    values.ctypes.data,
                    starts[item],
                    starts[item + 1],
                    hidden[row, _UNITS * part :].ctypes.data,
                )
        for row, item in enumerate(block):
            _ten_classes(hidden[row].ctypes.data, second.ctypes.data, logits.ctypes.data)
            if np.argmax(logits + last) != labels[item]:
                right[item] = False
                credit -= cost[item]
        seen += len(block)
    return seen


@numba.njit(cache=True, nogil=True, fastmath=_ANY_ORDER)
def _cross(a, b, mix, split, child):
    of_both = of_a = of_b = np.float32(0.0)
    for i in range(len(a)):
        of_both += a[i] * b[i]
        of_a += a[i] * a[i]
        of_b += b[i] * b[i]
    cosine = of_both / np.sqrt(np.float64(of_a) * of_b)
    for begin, end, share in ((0, split, mix), (split, len(a), 1.0 - mix)):
        factor_a, factor_b = arc(share, cosine)
        factor_a, factor_b = np.float32(factor_a), np.float32(factor_b)
        for i in range(begin, end):
            child[i] = factor_a * a[i] + factor_b * b[i]


@numba.njit(cache=True, nogil=True)
def _likely_failures_first(order, first, second):
    """`order`, but with the items that both parents fail first, and those that both solve last."""
    n_solvers = (first + second).astype(np.int64)
    sorted_order, places = np.empty_like(order), np.zeros(4, np.int64)
    for n in n_solvers:
        places[n + 1] += 1
    places = np.cumsum(places)
    for item in order:
        sorted_order[places[n_solvers[item]]] = item
        places[n_solvers[item]] += 1
    return sorted_order


@numba.njit(cache=True, parallel=True)
def _batch(
    members, solved, mates, mixes, splits, places, noise, images, labels, credit, cost, order, children, right, seen
):
    for n in prange(len(children)):
        _cross(members[mates[n, 0]], members[mates[n, 1]], mixes[n], splits[n], children[n])
        if len(noise) > 0:
            children[n] += noise[places[n] : places[n] + N_WEIGHTS]
        sorted_order = _likely_failures_first(order, solved[mates[n, 0]], solved[mates[n, 1]])
        seen[n] = _race(children[n], images, labels, credit, cost, sorted_order, right[n])


class Matings(NamedTuple):
    """The ingredients of each child: (n, 2) slots, (n,) mixes, (n,) split points, (n,) places in the noise table."""

    mates: np.ndarray
    mixes: np.ndarray
    splits: np.ndarray
    places: np.ndarray


class Nursery:
    """Makes and evaluates children on the training items.

    Args:
        noise: a table of normal random numbers; a mutated child gets `N_WEIGHTS` of them, starting at its place. Empty: no mutation.
    """

    def __init__(self, noise: Floats) -> None:
        self._noise = noise
        images, self._labels = digits()[:2]
        lit = [np.flatnonzero(image) for image in images]
        values = [image[pixels] for image, pixels in zip(images, lit, strict=True)]
        starts = np.cumsum([0, *map(len, lit)])
        self._images = starts, np.concatenate(lit).astype(np.int32), np.concatenate(values)
        self._results = np.empty((0, N_WEIGHTS), np.float32), np.empty((0, 0), np.bool_), np.empty(0, np.int64)

    def solved(self, weights: Floats) -> np.ndarray:
        """Which items a model gets right, (n_items,) bool."""
        right, n_items = np.empty(len(self._labels), np.bool_), len(self._labels)
        _race(
            weights, self._images, self._labels, np.full(1, np.inf), np.zeros((n_items, 1)), np.arange(n_items), right
        )
        return right

    def children(self, members: Floats, niches: Niches, matings: Matings) -> tuple[Floats, np.ndarray, np.ndarray]:
        """Weights (n, N_WEIGHTS), items solved (n, n_items), number of items evaluated (n,); overwritten by the next call.

        Items not evaluated, because the child had lost to every one of `niches`, count as solved.
        """
        n = len(matings.mates)
        if len(self._results[0]) != n:
            n_items = len(self._labels)
            self._results = (
                np.empty((n, N_WEIGHTS), np.float32),
                np.empty((n, n_items), np.bool_),
                np.empty(n, np.int64),
            )
        data = self._noise, self._images, self._labels
        _batch(members, niches.items, *matings, *data, *niches.stakes(), *self._results)
        return self._results
