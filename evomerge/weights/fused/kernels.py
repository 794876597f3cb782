"""The compiled merge: one pass over base and sources per output, for every method whose entries are merged independently.

An output element is `sum c_i theta_i` (linear, slerp) or `base + lambda * combine(w_i prune(theta_i - base))` (task vectors),
where prune is a test of the delta's magnitude, a random mask or nothing, and combine a sum or a sum over the elected sign.
Arithmetic is float32 in the order of the plain references, so both agree to the last bit.

Tensors are cut into windows of `LANES` elements that start at multiples of `LANES`; a window's values stay in registers. Where
only a part of a window is wanted (at the ends of a tensor or of a shard of it), that part goes through a small buffer.
"""

import numba
import numpy as np

from evomerge.weights.blocks import BF16, F16, F32_AS_BF16, load_block, store_block
from evomerge.weights.fused.lanes import (
    LANES,
    add_to_sums,
    bits_of,
    floats,
    from_bits,
    lane_of,
    largest_word,
    load_bfloat16,
    load_float16,
    load_float32,
    load_lanes,
    load_truths,
    load_uint16,
    no_sums,
    philox_words,
    select,
    store_float32,
    store_lanes,
    store_truths,
    store_upper_halves,
    to_words,
    total_sum,
    words,
)

KEEP_ALL, MAGNITUDE, BAND, RANDOM, RANKED = 0, 1, 2, 3, 4
"""how a source's delta is pruned; BAND drops the largest magnitudes too, RANKED drops at random by rank"""

_ROW_BYTES = 4 * LANES
_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)


@numba.njit(cache=True, nogil=True, inline="never")
def _load_part(address, kind, window, start, end, part):  # type: ignore[no-untyped-def]
    """Elements [start, end) of a tensor into their places of a window, zeros elsewhere."""
    part[:] = np.float32(0.0)
    load_block(address, kind, start, end - start, part[start - window :])


@numba.njit(cache=True, nogil=True)
def _load(address, kind, window, start, end, part):  # type: ignore[no-untyped-def]
    """A window of a tensor as float32; only [start, end) of it is read."""
    if end - start < LANES:
        _load_part(address, kind, window, start, end, part)
        return load_float32(part.ctypes.data)
    if kind == BF16:
        return load_bfloat16(address + 2 * window)
    if kind == F16:
        return load_float16(address + 2 * window)
    return load_float32(address + 4 * window)


@numba.njit(cache=True, nogil=True)
def _round_to_bf16(value):  # type: ignore[no-untyped-def]
    """Bits whose upper halves are `value` rounded to nearest even."""
    bits = bits_of(value)
    return bits + words(np.uint32(0x7FFF)) + ((bits >> words(np.uint32(16))) & words(np.uint32(1)))


@numba.njit(cache=True, nogil=True)
def _store(address, kind, at, n_elements, skipped, value, part):  # type: ignore[no-untyped-def]
    """Stores `n_elements` of a window after the first `skipped` ones, from element `at` of the memory on."""
    if n_elements < LANES:
        store_float32(part.ctypes.data, value)
        store_block(address, kind, at, n_elements, part[skipped:])
    elif kind == BF16:
        store_upper_halves(address + 2 * at, _round_to_bf16(value))
    elif kind == F32_AS_BF16:
        store_float32(address + 4 * at, from_bits(_round_to_bf16(value) & words(np.uint32(0xFFFF0000))))
    else:
        store_float32(address + 4 * at, value)


@numba.njit(cache=True, nogil=True, inline="never")
def _fill(thresholds, threshold, cutoff, window):  # type: ignore[no-untyped-def]
    """Least magnitudes that count as large, per lane of a window. Returns the next window that has others.

    Equal magnitudes count as larger before flat index `cutoff`, as smaller from there on.
    """
    above = np.nextafter(threshold, np.float32(np.inf))
    for element in range(LANES):
        thresholds[lane_of(element)] = threshold if window + element < cutoff else above
    edge = cutoff - cutoff % LANES
    if window < edge:
        return edge
    return edge + LANES if window == edge else np.int64(2**62)


@numba.njit(cache=True, nogil=True, inline="never")
def _set_thresholds(inputs, first, n_inputs, window, thresholds):  # type: ignore[no-untyped-def]
    """Fills `thresholds`, (n_inputs, 2, LANES) in the order of lanes, for `window`. Returns the next window that has others."""
    change = np.int64(2**62)
    for k in range(n_inputs):
        row = inputs[first + k]
        if row["mode"] in (MAGNITUDE, BAND):
            change = min(change, _fill(thresholds[k, 0], row["threshold"], row["cutoff"], window))
        if row["mode"] == BAND:
            change = min(change, _fill(thresholds[k, 1], row["top_threshold"], row["top_cutoff"], window))
    return change


@numba.njit(cache=True, nogil=True)
def _in_band(delta, mode, thresholds):  # type: ignore[no-untyped-def]
    """Whether magnitudes reach the row at address `thresholds` and, for BAND, stay below the next."""
    magnitude = from_bits(bits_of(delta) & words(_MAGNITUDE_BITS))
    keep = magnitude >= load_lanes(thresholds)
    return keep & (magnitude < load_lanes(thresholds + _ROW_BYTES)) if mode == BAND else keep


@numba.njit(cache=True, nogil=True)
def _agreeing(total, inputs, first_input, n_inputs, normalize, weighted):  # type: ignore[no-untyped-def]
    """Sum of the values (at address `weighted`) with the sign of `total` (+ where it is 0).

    Divided by the sum of their weights if `normalize`.
    """
    zero, one = floats(np.float32(0.0)), floats(np.float32(1.0))
    minus = bits_of(select(total >= zero, zero, from_bits(words(np.uint32(0x80000000)))))
    agreed, weights = zero, zero
    for k in range(n_inputs):
        value = load_lanes(weighted + k * _ROW_BYTES)
        agrees = from_bits(bits_of(value) ^ minus) > zero
        agreed = select(agrees, agreed + value, agreed)
        if normalize:
            weights = select(agrees, weights + floats(inputs[first_input + k]["weight"]), weights)
    return agreed / select(weights == zero, one, weights) if normalize else agreed


@numba.njit(cache=True, nogil=True, inline="never")
def _merge_chunk(first, last, output, inputs, thresholds, weighted, part):  # type: ignore[no-untyped-def]
    first_input, n_inputs = output["first_input"], output["n_inputs"]
    has_base, elect_sign, normalize = output["has_base"], output["elect_sign"], output["normalize"]
    base_address, base_kind = output["base_address"], output["base_kind"]
    divisor, scale = output["divisor"], output["scale"]
    zero = floats(np.float32(0.0))
    largest = words(np.uint32(0))
    change = np.int64(0)
    base = zero
    for window in range(first - first % LANES, last, LANES):
        start, end = max(window, first), min(window + LANES, last)
        if window >= change:
            change = _set_thresholds(inputs, first_input, n_inputs, window, thresholds)
        if has_base:
            base = _load(base_address, base_kind, window, start, end, part)
        total = zero
        for k in range(n_inputs):
            row = inputs[first_input + k]
            value = _load(row["address"], row["kind"], window, start, end, part)
            if has_base:
                delta = value - base
                mode = row["mode"]
                value = delta if row["scale"] == np.float32(1.0) else delta * floats(row["scale"])
                value = value * floats(row["weight"])
                if mode in (MAGNITUDE, BAND):
                    keep = _in_band(delta, mode, thresholds.ctypes.data + 2 * k * _ROW_BYTES)
                    value = select(keep, value, zero)
                elif mode != KEEP_ALL:
                    value = select(load_truths(row["mask_address"] + window // 8), value, zero)
            else:
                value = value * floats(row["weight"])
            total = total + value
            if elect_sign:
                store_lanes(weighted.ctypes.data + k * _ROW_BYTES, value)
        if elect_sign:
            total = _agreeing(total, inputs, first_input, n_inputs, normalize, weighted.ctypes.data)
        if divisor != np.float32(1.0):
            total = total / floats(divisor)
        if scale != np.float32(1.0):
            total = total * floats(scale)
        if has_base:
            total = total + base
        magnitude = bits_of(total) & words(_MAGNITUDE_BITS)
        largest = select(magnitude > largest, magnitude, largest)
        at = start - output["out_offset"]
        _store(output["out_address"], output["out_kind"], at, end - start, start - window, total, part)
    return largest_word(largest)


@numba.njit(cache=True, nogil=True)
def merge_chunks(chunks, outputs, inputs):  # type: ignore[no-untyped-def]
    """Computes chunks and writes the largest magnitude of each, as float32 bits (NaN above all), into `chunks`.

    The tables are those of `evomerge.weights.fused.tables`; row o of `outputs` owns the rows
    [first_input, first_input + n_inputs) of `inputs`. Random masks must have been made by `mask_chunks`.
    """
    n_rows = np.int32(1)
    for c in range(chunks.shape[0]):
        n_rows = max(n_rows, outputs[chunks[c]["output"]]["n_inputs"])
    thresholds = np.zeros((n_rows, 2, LANES), np.float32)
    weighted = np.empty((n_rows, LANES), np.float32)
    part = np.empty(LANES, np.float32)
    for c in range(chunks.shape[0]):
        output = outputs[chunks[c]["output"]]
        chunks[c]["largest"] = _merge_chunk(
            chunks[c]["start"], chunks[c]["end"], output, inputs, thresholds, weighted, part
        )


@numba.njit(cache=True, nogil=True, inline="never")
def _mask_chunk(first, last, output, inputs, number, thresholds, part):  # type: ignore[no-untyped-def]
    row = inputs[number]
    mode, measure = row["mode"], row["measure"]
    key0, key1, keep_below = np.uint64(row["key0"]), np.uint64(row["key1"]), words(row["keep"])
    low, step = floats(row["low"]), floats(row["step"])
    zero, whole = floats(np.float32(0.0)), floats(np.float32(2.0**32))
    sums = no_sums()
    change = np.int64(0)
    delta = zero
    for window in range(first - first % LANES, last, LANES):
        start, end = window, min(window + LANES, last)
        if window >= change:
            change = _set_thresholds(inputs, number, 1, window, thresholds)
        if measure:
            delta = _load(row["address"], row["kind"], window, start, end, part)
            delta = delta - _load(output["base_address"], output["base_kind"], window, start, end, part)
        if mode == RANDOM:
            keep = philox_words(key0, key1, window) < keep_below
        elif mode == RANKED:
            rank = load_uint16(row["rank_address"] + 2 * window)
            keep = philox_words(key0, key1, window) < to_words((low + rank * step) * whole)
        else:
            keep = _in_band(delta, mode, thresholds.ctypes.data)
        if mode in (RANDOM, RANKED):
            store_truths(row["mask_address"] + window // 8, keep)
        sums = add_to_sums(sums, from_bits(bits_of(select(keep, delta, zero)) & words(_MAGNITUDE_BITS)))
    return total_sum(sums)


@numba.njit(cache=True, nogil=True)
def mask_chunks(chunks, outputs, inputs):  # type: ignore[no-untyped-def]
    """Makes the random mask of the input row that each chunk names, and writes the L1 norm (float64) of what it keeps.

    The norm is that of the pruned delta, for every mode but KEEP_ALL, and 0 where the row does not ask to `measure`.
    Chunks start at multiples of `LANES`.
    """
    thresholds = np.zeros((1, 2, LANES), np.float32)
    part = np.empty(LANES, np.float32)
    for c in range(chunks.shape[0]):
        output = outputs[chunks[c]["output"]]
        chunks[c]["l1"] = _mask_chunk(
            chunks[c]["start"], chunks[c]["end"], output, inputs, chunks[c]["input"], thresholds, part
        )
