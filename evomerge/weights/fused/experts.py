"""Statistics over the whole tensors of all experts: inner products, energies, variances, numbers of changed entries.

Every function takes addresses and kinds of the experts' tensors followed by those of the base.
"""

import numba
import numpy as np

from evomerge.weights.fused.blocks import BLOCK, F32, as_bits, round_block
from evomerge.weights.fused.formulas import load_rows
from evomerge.weights.fused.kernels import round_lanes
from evomerge.weights.fused.lanes import (
    LANES,
    add_to_sums,
    bits_of,
    floats,
    load_lanes,
    no_sums,
    select,
    total_sum,
    words,
)


@numba.njit(cache=True, nogil=True)
def _load_deltas(addresses, kinds, precision, start, count, rows):  # type: ignore[no-untyped-def]
    """Like `load_rows`, with the base subtracted from every expert."""
    load_rows(addresses, kinds, precision, start, count, rows)
    n_experts = addresses.shape[0] - 1
    base = rows[n_experts]
    for k in range(n_experts):
        row = rows[k]
        for i in range(count):
            row[i] -= base[i]
        round_block(row, count, precision)


@numba.njit(cache=True, nogil=True)
def _add_products(a, b, sums):  # type: ignore[no-untyped-def]
    """Add a*a, b*b and a*b of two blocks to `sums`, (3, 8), in eight lanes each, so that the compiler can use vector registers."""
    for i in range(0, BLOCK, 8):
        for lane in range(8):
            x, y = np.float64(a[i + lane]), np.float64(b[i + lane])
            sums[0, lane] += x * x
            sums[1, lane] += y * y
            sums[2, lane] += x * y


@numba.njit(cache=True, nogil=True)
def inner_products(addresses, kinds, precision, n_elements, has_base):  # type: ignore[no-untyped-def]
    """Inner products (n, n) of two or more tensors, or, with a base, of their differences from it."""
    rows = np.zeros((addresses.shape[0], BLOCK), np.float32)
    n = addresses.shape[0] - has_base
    # squares are summed once for each pair, because the data is loaded for the product anyway
    sums = np.zeros((n, n, 3, 8), np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        if has_base:
            _load_deltas(addresses, kinds, precision, start, count, rows)
        else:
            load_rows(addresses, kinds, precision, start, count, rows)
        if count < BLOCK:
            rows[:, count:] = np.float32(0.0)
        for a in range(n):
            for b in range(a):
                _add_products(rows[a], rows[b], sums[a, b])
    gram = np.zeros((n, n), np.float64)
    for a in range(n):
        for b in range(a):
            gram[a, a], gram[b, b] = sums[a, b, 0].sum(), sums[a, b, 1].sum()
            gram[a, b] = gram[b, a] = sums[a, b, 2].sum()
    return gram


@numba.njit(cache=True, nogil=True, inline="never")
def _square_sum(row, count, order, limit, precision):  # type: ignore[no-untyped-def]
    """Sum of squares, in float64, of the entries of a block at address `row` whose place at `order` is below `limit` (order 0: all entries)."""
    sums = no_sums()
    for at in range(0, 4 * count, 4 * LANES):
        delta = load_lanes(row + at)
        square = round_lanes(delta * delta, precision)
        if order != 0:
            square = select(bits_of(load_lanes(order + at)) < words(limit), square, floats(np.float32(0.0)))
        sums = add_to_sums(sums, square)
    return total_sum(sums)


@numba.njit(cache=True, nogil=True)
def square_sums(addresses, kinds, precision, n_elements, order, limit):  # type: ignore[no-untyped-def]
    """Sum of squares of each expert's task vector, in float64, over the entries whose place is below `limit`.

    Args:
        order: address of a uint32 for every element, padded by a window; 0 = use all entries.
    """
    n_experts = addresses.shape[0] - 1
    rows, sums = np.empty((n_experts + 1, BLOCK), np.float32), np.zeros(n_experts, np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        _load_deltas(addresses, kinds, precision, start, count, rows)
        own = order + 4 * start if order != 0 else 0
        for k in range(n_experts):
            if precision == F32:
                sums[k] += _square_sum(rows[k].ctypes.data, count, own, limit, None)
            else:
                sums[k] += _square_sum(rows[k].ctypes.data, count, own, limit, precision)
    return sums


@numba.njit(cache=True, nogil=True)
def variances(addresses, kinds, precision, n_elements, variance):  # type: ignore[no-untyped-def]
    """Write the variance of every entry over the experts into `variance`, computed as in torch (Welford, in float64)."""
    n_experts = addresses.shape[0] - 1
    rows = np.empty((n_experts + 1, BLOCK), np.float32)
    means, squares = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        _load_deltas(addresses, kinds, precision, start, count, rows)
        means[:] = 0.0
        squares[:] = 0.0
        for k in range(n_experts):
            row, seen = rows[k], np.float64(k + 1)
            for i in range(count):
                value = np.float64(row[i])
                delta = value - means[i]
                mean = means[i] + delta / seen
                squares[i] += delta * (value - mean)
                means[i] = mean
        block = variance[start : start + count]
        for i in range(count):
            block[i] = np.float32(squares[i] / np.float64(n_experts))
        round_block(block, count, precision)


@numba.njit(cache=True, nogil=True)
def sort_keys(variance, keys):  # type: ignore[no-untyped-def]
    """Fill `keys` so that ascending keys mean descending variances, and ascending indices for equal ones; return the number of nonzero variances."""
    bits, found = variance.view(np.uint32), np.int64(0)
    for i in range(bits.shape[0]):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        found += magnitude != 0
        keys[i] = (np.uint64(0x7FFFFFFF - magnitude) << np.uint64(32)) | np.uint64(i)
    return found


@numba.njit(cache=True, nogil=True)
def places_of(keys, order):  # type: ignore[no-untyped-def]
    """Write the place of every element among sorted `keys` into `order`."""
    for place in range(keys.shape[0]):
        order[np.int64(keys[place] & np.uint64(0xFFFFFFFF))] = np.uint32(place)


@numba.njit(cache=True, nogil=True)
def mark_cut(variance, threshold, cutoff):  # type: ignore[no-untyped-def]
    """Overwrite every variance with the integer 0 if the cut keeps it, else 1."""
    bits, edge = variance.view(np.uint32), as_bits(threshold)
    for i in range(bits.shape[0]):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        bits[i] = np.uint32(0) if magnitude > edge or (magnitude == edge and i < cutoff) else np.uint32(1)


@numba.njit(cache=True, nogil=True)
def changed_by(addresses, kinds, precision, n_elements, epsilon):  # type: ignore[no-untyped-def]
    """Numbers of entries that each expert changes alone, and together with others, (2, experts); an entry is changed if |d| > `epsilon`."""
    n_experts = addresses.shape[0] - 1
    rows, totals = np.empty((n_experts + 1, BLOCK), np.float32), np.zeros((2, n_experts), np.int64)
    counts = np.empty(BLOCK, np.uint32)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        _load_deltas(addresses, kinds, precision, start, count, rows)
        counts[:] = np.uint32(0)
        for k in range(n_experts):
            row = rows[k]
            for i in range(count):
                counts[i] += np.uint32(abs(row[i]) > epsilon)
        for k in range(n_experts):
            row, alone, together = rows[k], np.uint32(0), np.uint32(0)
            for i in range(count):
                changed = np.uint32(abs(row[i]) > epsilon)
                alone += changed & np.uint32(counts[i] == 1)
                together += changed & np.uint32(counts[i] > 1)
            totals[0, k] += np.int64(alone)
            totals[1, k] += np.int64(together)
    return totals
