"""The compiled merge: one pass over base and sources per output, for every method whose entries are merged independently.

An output element is `sum c_i theta_i` (linear, slerp) or `base + lambda * combine(w_i prune(theta_i - base))` (task vectors),
where prune is a test of the delta's magnitude, a random mask or nothing, and combine is a sum or a sum over the elected sign.
Arithmetic is float32 in the order of the plain references, so both agree to the last bit. If a recipe asks for a lower precision,
sources and the result are rounded to it, and so is every intermediate step with task vectors.

Tensors are divided into windows of `LANES` elements that start at multiples of `LANES`; a window's values stay in registers. If
only a part of a window is needed (at the ends of a tensor or of a shard of it), it is computed on padded copies.
"""

import numba
import numpy as np

from evomerge.weights.fused.blocks import BF16, F16, F16_TINY, F16_TOO_LARGE, F32, F32_AS_BF16, load_block, store_block
from evomerge.weights.fused.lanes import (
    LANES,
    add_on_grid,
    bits_of,
    floats,
    from_bits,
    halves,
    lane_of,
    largest_word,
    load_bfloat16,
    load_float16,
    load_float32,
    load_lanes,
    load_truths,
    no_sums,
    prefetch,
    select,
    store_float32,
    store_lanes,
    store_truths,
    store_upper_halves,
    total_sum,
    words,
)
from evomerge.weights.fused.masks import decisions
from evomerge.weights.fused.tables import OUTPUT

KEEP_ALL, MAGNITUDE, BAND, RANDOM, RANKED = 0, 1, 2, 3, 4
"""how a source's delta is pruned; BAND also drops the largest magnitudes, RANKED drops at random by rank"""

_AHEAD = 384
"""prefetch distance in bytes: three windows of bfloat16. With hardware prefetching alone, a fifth of the time was spent waiting"""

_ROW_BYTES = 4 * LANES
_NEVER = np.int64(2**62)
_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _load(address, kind, window):  # type: ignore[no-untyped-def]
    """A window of a tensor as float32."""
    if kind == BF16:
        prefetch(address + 2 * window + _AHEAD)
        return load_bfloat16(address + 2 * window)
    if kind == F16:
        prefetch(address + 2 * window + _AHEAD)
        return load_float16(address + 2 * window)
    return load_float32(address + 4 * window)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _round_to_bf16(value):  # type: ignore[no-untyped-def]
    """Bits whose upper halves are `value` rounded to nearest even."""
    bits = bits_of(value)
    return bits + words(np.uint32(0x7FFF)) + ((bits >> words(np.uint32(16))) & words(np.uint32(1)))


@numba.njit(cache=True, nogil=True, forceinline=True)
def _round_to_f16(value):  # type: ignore[no-untyped-def]
    """`value` rounded to float16, as float32; see `evomerge.weights.fused.blocks.round_block`."""
    magnitude = bits_of(value) & words(_MAGNITUDE_BITS)
    half = floats(np.float32(0.5))
    small = bits_of((from_bits(magnitude) + half) - half)
    odd = (magnitude >> words(np.uint32(13))) & words(np.uint32(1))
    rounded = (magnitude + words(np.uint32(0x0FFF)) + odd) & words(np.uint32(0xFFFFE000))
    infinity = words(np.uint32(0x7F800000))
    beyond = select(magnitude > infinity, magnitude, infinity)
    rounded = select(rounded >= words(F16_TOO_LARGE), beyond, rounded)
    rounded = select(magnitude < words(F16_TINY), small, rounded)
    return from_bits(rounded | (bits_of(value) & words(np.uint32(0x80000000))))


@numba.njit(cache=True, nogil=True, forceinline=True)
def round_lanes(value, precision):  # type: ignore[no-untyped-def]
    """`value` rounded to `precision`: BF16, F16, F32 or None. For None, the compiler removes the code."""
    if precision is None:
        return value
    if precision == BF16:
        return from_bits(_round_to_bf16(value) & words(np.uint32(0xFFFF0000)))
    if precision == F16:
        return _round_to_f16(value)
    return value


@numba.njit(cache=True, nogil=True, forceinline=True)
def _load_rounded(address, kind, window, precision):  # type: ignore[no-untyped-def]
    value = _load(address, kind, window)
    if precision is None:
        return value
    return value if kind == precision else round_lanes(value, precision)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _store(address, kind, window, value):  # type: ignore[no-untyped-def]
    """Store a window of a tensor."""
    if kind == BF16:
        store_upper_halves(address + 2 * window, _round_to_bf16(value))
    elif kind == F32_AS_BF16:
        store_float32(address + 4 * window, from_bits(_round_to_bf16(value) & words(np.uint32(0xFFFF0000))))
    else:
        store_float32(address + 4 * window, value)


@numba.njit(cache=True, nogil=True, inline="never")
def _fill(thresholds, threshold, cutoff, window):  # type: ignore[no-untyped-def]
    """Fill in the smallest magnitude that counts as large for each lane of a window. Returns the next window with different thresholds.

    Magnitudes equal to the threshold count as large before flat index `cutoff`, and as small from there on.
    """
    above = np.nextafter(threshold, np.float32(np.inf))
    for element in range(LANES):
        thresholds[lane_of(element)] = threshold if window + element < cutoff else above
    edge = cutoff - cutoff % LANES
    if window < edge:
        return edge
    return edge + LANES if window == edge else _NEVER


@numba.njit(cache=True, nogil=True, inline="never")
def _set_thresholds(inputs, window, thresholds):  # type: ignore[no-untyped-def]
    """Fill `thresholds`, (inputs, 2, LANES) in the order of lanes, for `window`. Returns the next window with different thresholds."""
    change = _NEVER
    for k in range(inputs.shape[0]):
        row = inputs[k]
        if row["mode"] in (MAGNITUDE, BAND):
            change = min(change, _fill(thresholds[k, 0], row["threshold"], row["cutoff"], window))
        if row["mode"] == BAND:
            change = min(change, _fill(thresholds[k, 1], row["top_threshold"], row["top_cutoff"], window))
    return change


@numba.njit(cache=True, nogil=True, forceinline=True)
def magnitude_of(value):  # type: ignore[no-untyped-def]
    """`value` without its sign."""
    return from_bits(bits_of(value) & words(_MAGNITUDE_BITS))


@numba.njit(cache=True, nogil=True, forceinline=True)
def _only_large(value, delta, mode, thresholds):  # type: ignore[no-untyped-def]
    """`value` where |delta| reaches the row of thresholds at address `thresholds` and, for BAND, is below the next row; 0 elsewhere."""
    zero = floats(np.float32(0.0))
    magnitude = magnitude_of(delta)
    value = select(magnitude >= load_lanes(thresholds), value, zero)
    if mode == BAND:
        value = select(magnitude < load_lanes(thresholds + _ROW_BYTES), value, zero)
    return value


@numba.njit(cache=True, nogil=True, forceinline=True)
def _agreeing(total, inputs, normalize, weighted, precision):  # type: ignore[no-untyped-def]
    """Sum of the values (at address `weighted`) with the sign of `total`, divided by the sum of their weights if `normalize`.

    `total` cannot be -0, because the sum started from 0.
    """
    zero, one = floats(np.float32(0.0)), floats(np.float32(1.0))
    sign = bits_of(total) & words(np.uint32(0x80000000))
    agreed, weights = zero, zero
    for k in range(inputs.shape[0]):
        value = load_lanes(weighted + k * _ROW_BYTES)
        agrees = from_bits(bits_of(value) ^ sign) > zero
        agreed = select(agrees, agreed + value, agreed)
        if normalize:
            weights = select(agrees, weights + floats(inputs[k]["weight"]), weights)
    agreed, weights = round_lanes(agreed, precision), round_lanes(weights, precision)
    return round_lanes(agreed / select(weights == zero, one, weights), precision) if normalize else agreed


@numba.njit(cache=True, nogil=True, inline="never")
def _merge_windows(first, last, out_address, output, inputs, thresholds, weighted, precision):  # type: ignore[no-untyped-def]
    """Compute whole windows; `thresholds` and `weighted` are scratch memory for each input."""
    has_base, elect_sign, normalize = output["has_base"], output["elect_sign"], output["normalize"]
    base_address, base_kind = output["base_address"], output["base_kind"]
    out_kind, divisor, scale = output["out_kind"], output["divisor"], output["scale"]
    zero = floats(np.float32(0.0))
    largest = words(np.uint32(0))
    change = np.int64(0)
    base = zero
    for window in range(first, last, LANES):
        if window >= change:
            change = _set_thresholds(inputs, window, thresholds)
        total = zero
        if has_base:
            base = _load_rounded(base_address, base_kind, window, precision)
        for k in range(inputs.shape[0]):
            value = _load_rounded(inputs[k]["address"], inputs[k]["kind"], window, precision)
            weight = floats(inputs[k]["weight"])
            if has_base:
                delta = round_lanes(value - base, precision)
                mode = inputs[k]["mode"]
                row = thresholds.ctypes.data + 2 * k * _ROW_BYTES
                if mode == KEEP_ALL:
                    value = round_lanes(delta * weight, precision)
                elif mode == MAGNITUDE and inputs[k]["scale"] == np.float32(1.0):
                    value = select(magnitude_of(delta) >= load_lanes(row), round_lanes(delta * weight, precision), zero)
                else:
                    value = round_lanes(round_lanes(delta * floats(inputs[k]["scale"]), precision) * weight, precision)
                    if mode in (MAGNITUDE, BAND):
                        value = _only_large(value, delta, mode, row)
                    else:
                        value = select(load_truths(inputs[k]["mask_address"] + window // 8), value, zero)
            else:
                value = value * weight
            total = total + value
            if elect_sign:
                store_lanes(weighted.ctypes.data + k * _ROW_BYTES, value)
        if has_base:
            total = round_lanes(total, precision)
        if elect_sign:
            total = _agreeing(total, inputs, normalize, weighted.ctypes.data, precision)
        if divisor != np.float32(1.0):
            total = total / floats(divisor)
        if scale != np.float32(1.0):
            total = round_lanes(total, precision) * floats(scale)
        if has_base:
            total = round_lanes(total, precision) + base
        total = round_lanes(total, precision)
        magnitude = bits_of(magnitude_of(total))
        largest = select(magnitude > largest, magnitude, largest)
        _store(out_address, out_kind, window, total)
    return largest_word(largest)


@numba.njit(cache=True, nogil=True)
def _merge_part(window, start, end, out_address, output, inputs, thresholds, weighted, copies, outputs, precision):  # type: ignore[no-untyped-def]
    """Compute elements [start, end) of a window on copies padded with zeros.

    Args:
        copies: space for base, inputs and result, (n_inputs + 2, LANES); zeroed here.
        outputs: space for one row. Both belong to the caller, which keeps alive the memory that the rows point to.
    """
    n_inputs = inputs.shape[0]
    copies[:] = np.float32(0.0)
    merged = copies[n_inputs + 1]
    rows = inputs.copy()
    outputs[0] = output
    whole = outputs[0]
    for k in range(n_inputs):
        load_block(inputs[k]["address"], inputs[k]["kind"], start, end - start, copies[k, start - window :])
        rows[k]["address"], rows[k]["kind"] = copies[k].ctypes.data - 4 * window, F32
    if output["has_base"]:
        base = copies[n_inputs]
        load_block(output["base_address"], output["base_kind"], start, end - start, base[start - window :])
        whole["base_address"], whole["base_kind"] = base.ctypes.data - 4 * window, F32
    whole["out_kind"] = F32
    at = merged.ctypes.data - 4 * window
    largest = _merge_windows(window, window + LANES, at, whole, rows, thresholds, weighted, precision)
    store_block(out_address, output["out_kind"], start, end - start, merged[start - window :])
    return largest


@numba.njit(cache=True, nogil=True)
def _merge_range(first, last, out_address, output, inputs, precision):  # type: ignore[no-untyped-def]
    """Compute elements [first, last) of an output; return the bits of their largest magnitude."""
    n_inputs = inputs.shape[0]
    thresholds, weighted = np.zeros((n_inputs, 2, LANES), np.float32), np.empty((n_inputs, LANES), np.float32)
    copies, row = np.empty((n_inputs + 2, LANES), np.float32), np.empty(1, OUTPUT)
    largest = np.uint32(0)
    if first % LANES:
        end = min(first - first % LANES + LANES, last)
        window = first - first % LANES
        largest = _merge_part(
            window, first, end, out_address, output, inputs, thresholds, weighted, copies, row, precision
        )
        first = end
    middle = first + (last - first) // LANES * LANES
    inside = _merge_windows(first, middle, out_address, output, inputs, thresholds, weighted, precision)
    largest = max(largest, inside)
    if middle < last:
        rest = _merge_part(
            middle, middle, last, out_address, output, inputs, thresholds, weighted, copies, row, precision
        )
        largest = max(largest, rest)
    return largest


@numba.njit(cache=True, nogil=True)
def merge_chunks(chunks, outputs, inputs):  # type: ignore[no-untyped-def]
    """Compute chunks and write the largest magnitude of each, as float32 bits (NaN above all), into `chunks`.

    The tables are those of `evomerge.weights.fused.tables`; row o of `outputs` owns the rows
    [first_input, first_input + n_inputs) of `inputs`. Random masks must have been made by `mask_chunks`.
    """
    for c in range(chunks.shape[0]):
        output = outputs[chunks[c]["output"]]
        own = inputs[output["first_input"] : output["first_input"] + output["n_inputs"]]
        first, last, to = chunks[c]["start"], chunks[c]["end"], chunks[c]["out_address"]
        # compiled twice: checks for rounding that is not needed would cost a sixth of the time
        if output["precision"] == F32:
            chunks[c]["largest"] = _merge_range(first, last, to, output, own, None)
        else:
            chunks[c]["largest"] = _merge_range(first, last, to, output, own, output["precision"])


@numba.njit(cache=True, nogil=True, inline="never")
def _draw_windows(first, last, row):  # type: ignore[no-untyped-def]
    """Generate the random mask of whole windows."""
    key0, key1, keep = np.uint64(row["key0"]), np.uint64(row["key1"]), halves(np.uint16(row["keep"]))
    ranks, step, mask_address = row["rank_address"], row["step"], row["mask_address"]
    for window in range(first, last, LANES):
        store_truths(mask_address + window // 8, decisions(key0, key1, ranks, step, window) < keep)


@numba.njit(cache=True, nogil=True, inline="never")
def _mask_windows(first, last, output, inputs, thresholds):  # type: ignore[no-untyped-def]
    """Mask whole windows of the single row `inputs`; return the L1 norm of the kept elements."""
    row = inputs[0]
    base_address, base_kind, precision = output["base_address"], output["base_kind"], output["precision"]
    address, kind, mode, grid = row["address"], row["kind"], row["mode"], row["grid"]
    key0, key1, keep = np.uint64(row["key0"]), np.uint64(row["key1"]), halves(np.uint16(row["keep"]))
    ranks, step, mask_address = row["rank_address"], row["step"], row["mask_address"]
    zero = floats(np.float32(0.0))
    sums = no_sums()
    change = np.int64(0)
    for window in range(first, last, LANES):
        base = _load_rounded(base_address, base_kind, window, precision)
        kept = magnitude_of(round_lanes(_load_rounded(address, kind, window, precision) - base, precision))
        if mode in (RANDOM, RANKED):
            truths = decisions(key0, key1, ranks, step, window) < keep
            store_truths(mask_address + window // 8, truths)
            kept = select(truths, kept, zero)
        else:
            if window >= change:
                change = _set_thresholds(inputs, window, thresholds)
            kept = _only_large(kept, kept, mode, thresholds.ctypes.data)
        sums = add_on_grid(sums, kept, grid)
    return total_sum(sums)


@numba.njit(cache=True, nogil=True)
def _mask_part(window, end, output, inputs, thresholds, copies, outputs):  # type: ignore[no-untyped-def]
    """Mask the elements of a window before `end` on copies padded with zeros; `copies` as in `_merge_part`."""
    copies[:] = np.float32(0.0)
    rows = inputs.copy()
    outputs[0] = output
    whole = outputs[0]
    load_block(output["base_address"], output["base_kind"], window, end - window, copies[0])
    load_block(inputs[0]["address"], inputs[0]["kind"], window, end - window, copies[1])
    whole["base_address"], whole["base_kind"] = copies[0].ctypes.data - 4 * window, F32
    rows[0]["address"], rows[0]["kind"] = copies[1].ctypes.data - 4 * window, F32
    return _mask_windows(window, window + LANES, whole, rows, thresholds)


@numba.njit(cache=True, nogil=True)
def mask_chunks(chunks, outputs, inputs):  # type: ignore[no-untyped-def]
    """Generate the random mask of the input row that each chunk names, and write the L1 norm (float64) of the kept elements.

    The norm is that of the pruned delta, for every mode except KEEP_ALL, with addends rounded by the row's `grid`; if the row's
    `measure` is false, it is 0 and no tensor is read. Chunks start at multiples of `LANES`.
    """
    thresholds = np.zeros((1, 2, LANES), np.float32)
    copies, row = np.empty((2, LANES), np.float32), np.empty(1, OUTPUT)
    for c in range(chunks.shape[0]):
        output, own = outputs[chunks[c]["output"]], inputs[chunks[c]["input"] : chunks[c]["input"] + 1]
        first, last = chunks[c]["start"], chunks[c]["end"]
        if not own[0]["measure"]:
            _draw_windows(first, last, own[0])  # masks and ranks have room for whole windows
            chunks[c]["l1"] = 0.0
            continue
        middle = first + (last - first) // LANES * LANES
        l1 = _mask_windows(first, middle, output, own, thresholds)
        if middle < last:
            l1 += _mask_part(middle, last, output, own, thresholds, copies, row)
        chunks[c]["l1"] = l1
