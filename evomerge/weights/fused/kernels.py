"""The compiled merge: one pass over base and sources per output, for every method whose entries are merged independently.

An output element is `sum c_i theta_i` (linear, slerp) or `base + lambda * combine(w_i prune(theta_i - base))` (task vectors),
where prune is a test of the delta's magnitude, a random mask or nothing, and combine a sum or a sum over the elected sign.
Arithmetic is float32 in the order of the plain references, so both agree to the last bit.
"""

import numba
import numpy as np

from evomerge.weights.blocks import BLOCK, load_block, philox_block, store_block

KEEP_ALL, MAGNITUDE, BAND, RANDOM = 0, 1, 2, 3
"""how a source's delta is pruned; BAND drops the largest magnitudes too"""


@numba.njit(cache=True, nogil=True, inline="never")
def _drop_below(block, threshold):  # type: ignore[no-untyped-def]
    """Zeroes magnitudes below `threshold`."""
    for i in range(block.shape[0]):
        value = block[i]
        block[i] = value if abs(value) >= threshold else np.float32(0.0)


@numba.njit(cache=True, nogil=True, inline="never")
def _drop_from(block, threshold):  # type: ignore[no-untyped-def]
    """Zeroes magnitudes of `threshold` and above."""
    for i in range(block.shape[0]):
        value = block[i]
        block[i] = value if abs(value) < threshold else np.float32(0.0)


@numba.njit(cache=True, nogil=True, inline="never")
def _drop_at_random(block, words, keep):  # type: ignore[no-untyped-def]
    """Zeroes elements whose word is not below `keep`."""
    for i in range(block.shape[0]):
        value = block[i]
        block[i] = value if words[i] < keep else np.float32(0.0)


@numba.njit(cache=True, nogil=True, inline="never")
def _prune(block, start, count, prune, words):  # type: ignore[no-untyped-def]
    """Applies one row of the `prunes` table to a block of deltas."""
    mode = prune["mode"]
    if mode in (MAGNITUDE, BAND):
        # equal magnitudes count as larger before flat index `cutoff`, as smaller from there on
        threshold = prune["threshold"]
        split = min(max(prune["cutoff"] - start, 0), count)
        _drop_below(block[:split], threshold)
        _drop_below(block[split:count], np.nextafter(threshold, np.float32(np.inf)))
    if mode == BAND:
        threshold = prune["top_threshold"]
        split = min(max(prune["top_cutoff"] - start, 0), count)
        _drop_from(block[:split], threshold)
        _drop_from(block[split:count], np.nextafter(threshold, np.float32(np.inf)))
    if mode == RANDOM and prune["keep"] < np.uint64(1) << np.uint64(32):
        skip = philox_block(prune["key0"], prune["key1"], start, count, words)
        _drop_at_random(block[:count], words[skip : skip + count], np.uint32(prune["keep"]))
    scale = prune["scale"]
    if scale != np.float32(1.0):
        for i in range(count):
            block[i] *= scale


# The loops below touch two or three arrays each: with more, the compiler gives up proving that they do not overlap and
# does not vectorise. The arrays stay in the cache, so more loops cost little.


@numba.njit(cache=True, nogil=True, inline="never")
def _add(total, block, count, weight):  # type: ignore[no-untyped-def]
    for i in range(count):
        total[i] += block[i] * weight


@numba.njit(cache=True, nogil=True, inline="never")
def _subtract(block, base, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        block[i] -= base[i]


@numba.njit(cache=True, nogil=True, inline="never")
def _multiply(block, count, factor):  # type: ignore[no-untyped-def]
    for i in range(count):
        block[i] *= factor


@numba.njit(cache=True, nogil=True, inline="never")
def _add_positive(positive, block, count):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for i in range(count):
        value = block[i]
        positive[i] += value if value > zero else zero


@numba.njit(cache=True, nogil=True, inline="never")
def _add_negative(negative, block, count):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for i in range(count):
        value = block[i]
        negative[i] += value if value < zero else zero


@numba.njit(cache=True, nogil=True, inline="never")
def _add_weights(positive, negative, block, count, weight):  # type: ignore[no-untyped-def]
    zero = np.float32(0.0)
    for i in range(count):
        value = block[i]
        positive[i] += weight if value > zero else zero
        negative[i] += weight if value < zero else zero


@numba.njit(cache=True, nogil=True, inline="never")
def _choose(chosen, total, positive, negative, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        plus, minus = positive[i], negative[i]  # loaded unconditionally, or the loop would branch
        chosen[i] = plus if total[i] >= np.float32(0.0) else minus


@numba.njit(cache=True, nogil=True, inline="never")
def _divide(block, divisors, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        divisor = divisors[i]
        block[i] /= divisor if divisor != np.float32(0.0) else np.float32(1.0)


@numba.njit(cache=True, nogil=True, inline="never")
def _finish(total, base, count, divisor, scale, has_base):  # type: ignore[no-untyped-def]
    if divisor != np.float32(1.0):
        for i in range(count):
            total[i] /= divisor
    if scale != np.float32(1.0):
        _multiply(total, count, scale)
    if has_base:
        for i in range(count):
            total[i] += base[i]


@numba.njit(cache=True, nogil=True)
def merge_chunks(chunks, outputs, inputs):  # type: ignore[no-untyped-def]
    """Computes the chunks [(row of `outputs`, first element, end)] and writes each output's largest magnitude into `chunks`.

    `outputs` and `inputs` are the tables of `evomerge.weights.fused.jobs`; row o of `outputs` owns the rows
    [first_input, first_input + n_inputs) of `inputs`.
    """
    base = np.empty(BLOCK, np.float32)
    block = np.empty(BLOCK, np.float32)
    total = np.empty(BLOCK, np.float32)
    positive = np.empty(BLOCK, np.float32)
    negative = np.empty(BLOCK, np.float32)
    positive_weight = np.empty(BLOCK, np.float32)
    negative_weight = np.empty(BLOCK, np.float32)
    words = np.empty(BLOCK + 8, np.uint32)
    for c in range(chunks.shape[0]):
        output = outputs[chunks[c]["output"]]
        elect_sign, has_base = output["elect_sign"], output["has_base"]
        by_weight = elect_sign and output["normalize"]
        largest = np.uint32(0)
        for start in range(chunks[c]["start"], chunks[c]["end"], BLOCK):
            count = min(BLOCK, chunks[c]["end"] - start)
            total[:count] = np.float32(0.0)
            if elect_sign:
                positive[:count] = np.float32(0.0)
                negative[:count] = np.float32(0.0)
            if by_weight:
                positive_weight[:count] = np.float32(0.0)
                negative_weight[:count] = np.float32(0.0)
            if has_base:
                load_block(output["base_address"], output["base_kind"], start, count, base)
            for row in range(output["first_input"], output["first_input"] + output["n_inputs"]):
                load_block(inputs[row]["address"], inputs[row]["kind"], start, count, block)
                weight = inputs[row]["weight"]
                if has_base:
                    _subtract(block, base, count)
                    _prune(block, start, count, inputs[row], words)
                if elect_sign:
                    _multiply(block, count, weight)
                    _add(total, block, count, np.float32(1.0))
                    _add_positive(positive, block, count)
                    _add_negative(negative, block, count)
                    if by_weight:
                        _add_weights(positive_weight, negative_weight, block, count, weight)
                else:
                    _add(total, block, count, weight)
            result = total
            if elect_sign:
                _choose(block, total, positive, negative, count)
                result = block
            if by_weight:
                _choose(positive, total, positive_weight, negative_weight, count)
                _divide(result, positive, count)
            _finish(result, base, count, output["divisor"], output["scale"], has_base)
            at = start - output["out_offset"]
            largest = max(largest, store_block(output["out_address"], output["out_kind"], at, count, result))
        chunks[c]["largest"] = largest


@numba.njit(cache=True, nogil=True)
def pruned_l1_chunks(chunks, outputs, inputs):  # type: ignore[no-untyped-def]
    """Writes into each chunk the L1 norm (float64) of the pruned delta of the one input row that it names."""
    base = np.empty(BLOCK, np.float32)
    block = np.empty(BLOCK, np.float32)
    words = np.empty(BLOCK + 8, np.uint32)
    lanes = np.empty(16, np.float64)
    for c in range(chunks.shape[0]):
        output, row = outputs[chunks[c]["output"]], chunks[c]["input"]
        lanes[:] = 0.0
        for start in range(chunks[c]["start"], chunks[c]["end"], BLOCK):
            count = min(BLOCK, chunks[c]["end"] - start)
            load_block(output["base_address"], output["base_kind"], start, count, base)
            load_block(inputs[row]["address"], inputs[row]["kind"], start, count, block)
            _subtract(block, base, count)
            _prune(block, start, count, inputs[row], words)
            whole = count - count % 16
            for i in range(0, whole, 16):
                for lane in range(16):
                    lanes[lane] += np.float64(abs(block[i + lane]))
            for i in range(whole, count):
                lanes[0] += np.float64(abs(block[i]))
        chunks[c]["l1"] = lanes.sum()
