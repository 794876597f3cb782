"""Compiled merges other than the sums of `evomerge.weights.fused.kernels`, each in one pass over base and sources.

nearswap, ram, ramplus_tl, sce and, with precomputed numbers for every row, arcee_fusion, filter-wise model_stock and row-wise nuslerp.

A block of each tensor is converted to float32 in the first-level cache, and the formula is applied to it in vectors. The results equal those
of the plain references to the last bit, in float32 and in lower precision if a recipe asks for that.
"""

import numba
import numpy as np

from evomerge.weights.fused.blocks import BLOCK, F32, load_block, round_block, store_block
from evomerge.weights.fused.kernels import magnitude_of, round_lanes
from evomerge.weights.fused.lanes import LANES, bits_of, floats, from_bits, load_lanes, select, store_lanes, words

SUM, NEARSWAP, RAM, SCE, FUSION, STOCK, ARC = 0, 1, 2, 3, 4, 5, 6
"""numbers of the formulas; SUM is computed by `evomerge.weights.fused.kernels`, the others here"""

_TINY = np.float32(1e-6)
_SIGN = np.uint32(0x80000000)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _nearswap(rows, merged, at, t, precision):  # type: ignore[no-untyped-def]
    """Compute the window at offset `at` of every row, see `evomerge.weights.methods.nearswap`."""
    zero, one = floats(np.float32(0.0)), floats(np.float32(1.0))
    other, base = load_lanes(rows + at), load_lanes(rows + 4 * BLOCK + at)
    least = round_lanes(floats(_TINY), precision)
    distance = magnitude_of(round_lanes(base - other, precision))
    distance = select(distance < least, least, distance)
    # torch divides a number by a tensor in two steps
    share = round_lanes(round_lanes(one / distance, precision) * floats(t), precision)
    share = select(share > one, one, select(share >= zero, share, zero))  # NaN becomes 0, as in the reference
    rest = round_lanes(round_lanes(one - share, precision) * base, precision)
    store_lanes(merged + at, round_lanes(round_lanes(share * other, precision) + rest, precision))


@numba.njit(cache=True, nogil=True, forceinline=True)
def _ram(rows, merged, at, inputs, epsilon, mean, precision):  # type: ignore[no-untyped-def]
    """As above for `ram` if `mean`, else for `ramplus_tl`, where each input's weight is the factor of its own entries and the sum is not rounded."""
    zero, one = floats(np.float32(0.0)), floats(np.float32(1.0))
    n_inputs = inputs.shape[0]
    base = load_lanes(rows + 4 * BLOCK * n_inputs + at)
    least = round_lanes(floats(epsilon), precision)
    count = zero
    for k in range(n_inputs):
        row = rows + 4 * BLOCK * k + at
        delta = round_lanes(load_lanes(row) - base, precision)
        changed = magnitude_of(delta) > least
        count = select(changed, count + one, count)
        store_lanes(row, select(changed, delta, zero))
    several = count > one
    divisor = select(several, count, one)
    total = zero
    for k in range(n_inputs):
        delta = load_lanes(rows + 4 * BLOCK * k + at)
        part = round_lanes(delta / divisor, precision)
        total = total + (part if mean else select(several, part, delta * floats(inputs[k]["weight"])))
    if mean:
        store_lanes(merged + at, round_lanes(base + round_lanes(total, precision), precision))
    else:
        store_lanes(merged + at, base + total)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _sce(rows, merged, at, inputs, order, limit, precision):  # type: ignore[no-untyped-def]
    """As above for `sce`, over the entries whose place at address `order` is below `limit` (order 0: all), with the inputs' weights."""
    zero = floats(np.float32(0.0))
    n_inputs = inputs.shape[0]
    base = load_lanes(rows + 4 * BLOCK * n_inputs + at)
    total = zero
    for k in range(n_inputs):
        row = rows + 4 * BLOCK * k + at
        delta = round_lanes(load_lanes(row) - base, precision)
        if order != 0:
            delta = select(bits_of(load_lanes(order + at)) < words(limit), delta, zero)
        total = total + delta
        store_lanes(row, delta)
    minus = bits_of(select(round_lanes(total, precision) >= zero, zero, from_bits(words(_SIGN))))
    agreed, weights = zero, zero
    for k in range(n_inputs):
        delta, weight = load_lanes(rows + 4 * BLOCK * k + at), floats(inputs[k]["weight"])
        agrees = from_bits(bits_of(delta) ^ minus) > zero
        agreed = select(agrees, agreed + round_lanes(delta * weight, precision), agreed)
        weights = select(agrees, weights + weight, weights)
    agreed, weights = round_lanes(agreed, precision), round_lanes(weights, precision)
    least = round_lanes(floats(_TINY), precision)
    mean = round_lanes(agreed / select(weights < least, least, weights), precision)
    store_lanes(merged + at, round_lanes(base + mean, precision))


@numba.njit(cache=True, nogil=True, forceinline=True)
def _fusion(rows, merged, at, numbers, least, precision):  # type: ignore[no-untyped-def]
    """As above with each row's divergence at address `numbers`, see `evomerge.weights.methods.arcee_fusion`."""
    zero, one = floats(np.float32(0.0)), floats(np.float32(1.0))
    other, base = load_lanes(rows + at), load_lanes(rows + 4 * BLOCK + at)
    delta = round_lanes(other - base, precision)
    importance = round_lanes(magnitude_of(delta) * load_lanes(numbers + at), precision)
    taken = delta * select(importance >= floats(least), one, zero)
    store_lanes(merged + at, base + taken)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _stock(rows, merged, at, inputs, numbers):  # type: ignore[no-untyped-def]
    """As above with each row's t, see `evomerge.weights.methods.model_stock`; float32 only, like all methods based on directions."""
    one, total = floats(np.float32(1.0)), floats(np.float32(0.0))
    n_inputs = inputs.shape[0]
    base, t = load_lanes(rows + 4 * BLOCK * n_inputs + at), load_lanes(numbers + at)
    for k in range(n_inputs):
        total = total + load_lanes(rows + 4 * BLOCK * k + at)
    average = total / floats(np.float32(n_inputs))
    store_lanes(merged + at, t * average + (one - t) * base)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _arc(rows, merged, at, numbers, has_base):  # type: ignore[no-untyped-def]
    """As above with each row's factors of the two sources and the divisor of their sum, see `evomerge.weights.methods.nuslerp`."""
    base = load_lanes(rows + 8 * BLOCK + at)
    a, b = load_lanes(rows + at), load_lanes(rows + 4 * BLOCK + at)
    if has_base:
        a, b = a - base, b - base
    a, b = load_lanes(numbers + at) * a, load_lanes(numbers + 4 * BLOCK + at) * b
    total = (a + b) / load_lanes(numbers + 8 * BLOCK + at)
    store_lanes(merged + at, base + total if has_base else total)


@numba.njit(cache=True, nogil=True, inline="never")
def _spread(address, n_rows, n_columns, start, count, few, numbers):  # type: ignore[no-untyped-def]
    """Expand per-row numbers (consecutive arrays at `address`) to `count` elements from `start` on.

    Args:
        few: scratch memory for the numbers of a block's rows, (BLOCK,).
        numbers: the result, (arrays, BLOCK).
    """
    first = start // n_columns
    own = (start + count - 1) // n_columns - first + 1
    for j in range(numbers.shape[0]):
        load_block(address + 4 * j * n_rows, F32, first, own, few)
        at, left = 0, n_columns - start % n_columns
        for r in range(own):
            end = min(at + left, count)
            numbers[j, at:end] = few[r]
            at, left = end, n_columns


@numba.njit(cache=True, nogil=True)
def load_rows(addresses, kinds, precision, start, count, rows):  # type: ignore[no-untyped-def]
    """Load elements [start, start + count) of each tensor into a row of `rows`, rounded to `precision` and padded with zeros to a whole window."""
    edge = -(-count // LANES) * LANES
    for k in range(addresses.shape[0]):
        row = rows[k]
        load_block(addresses[k], kinds[k], start, count, row)
        if kinds[k] != precision:
            round_block(row, count, precision)
        row[count:edge] = np.float32(0.0)


@numba.njit(cache=True, nogil=True, inline="never")
def _windows(rows, merged, count, output, inputs, order, numbers, precision):  # type: ignore[no-untyped-def]
    """Apply the formula of `output` to `count` elements of the blocks at these addresses."""
    formula, parameter, mean, has_base = output["formula"], output["parameter"], output["normalize"], output["has_base"]
    limit = np.uint32(inputs[0]["cutoff"])
    for at in range(0, 4 * count, 4 * LANES):
        if formula == NEARSWAP:
            _nearswap(rows, merged, at, parameter, precision)
        elif formula == RAM:
            _ram(rows, merged, at, inputs, parameter, mean, precision)
        elif formula == SCE:
            _sce(rows, merged, at, inputs, order, limit, precision)
        elif formula == FUSION:
            _fusion(rows, merged, at, numbers, parameter, precision)
        elif formula == STOCK:
            _stock(rows, merged, at, inputs, numbers)
        else:
            _arc(rows, merged, at, numbers, has_base)


@numba.njit(cache=True, nogil=True)
def formula_chunks(chunks, outputs, inputs):  # type: ignore[no-untyped-def]
    """Compute chunks like `evomerge.weights.fused.kernels.merge_chunks`."""
    for c in range(chunks.shape[0]):
        output = outputs[chunks[c]["output"]]
        n_inputs = output["n_inputs"]
        own = inputs[output["first_input"] : output["first_input"] + n_inputs]
        addresses, kinds = np.empty(n_inputs + 1, np.int64), np.empty(n_inputs + 1, np.int32)
        for k in range(n_inputs):
            addresses[k], kinds[k] = own[k]["address"], own[k]["kind"]
        # without a base, its row is unused and filled from another source
        addresses[n_inputs] = output["base_address"] if output["has_base"] else addresses[0]
        kinds[n_inputs] = output["base_kind"] if output["has_base"] else kinds[0]
        rows, merged = np.empty((n_inputs + 1, BLOCK), np.float32), np.empty(BLOCK, np.float32)
        numbers, few = np.empty((output["n_numbers"], BLOCK), np.float32), np.empty(BLOCK, np.float32)
        loaded, result, precision = rows.ctypes.data, merged.ctypes.data, output["precision"]
        columns = max(output["n_columns"], 1)
        n_rows = output["n_elements"] // columns
        largest = np.uint32(0)
        for start in range(chunks[c]["start"], chunks[c]["end"], BLOCK):
            count = min(BLOCK, chunks[c]["end"] - start)
            load_rows(addresses, kinds, precision, start, count, rows)
            order = own[0]["rank_address"] + 4 * start if own[0]["rank_address"] != 0 else 0
            if output["n_numbers"] > 0:
                _spread(output["number_address"], n_rows, columns, start, count, few, numbers)
            # compiled twice, as for sums
            if precision == F32:
                _windows(loaded, result, count, output, own, order, numbers.ctypes.data, None)
            else:
                _windows(loaded, result, count, output, own, order, numbers.ctypes.data, precision)
            stored = store_block(chunks[c]["out_address"], output["out_kind"], start, count, merged)
            largest = max(largest, stored)
        chunks[c]["largest"] = largest
