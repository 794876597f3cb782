"""Prunes a block of deltas on a GPU, by magnitude, at random or at random by rank: the same decisions as in the CPU kernels, bit for bit."""

import triton
import triton.language as tl

from evomerge.weights.philox import MASK_ROUNDS

# values that kernels read must be compile-time constants
_ROUNDS = tl.constexpr(MASK_ROUNDS)

# same numbers as in evomerge.weights.fused.kernels, checked by a test
KEEP_ALL, MAGNITUDE, BAND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RANDOM, RANKED = tl.constexpr(3), tl.constexpr(4)


@triton.jit
def random_block(key0, key1, start, stretches, STRIDED: tl.constexpr, BLOCK: tl.constexpr):
    """The random numbers of masks for elements [start, start + BLOCK) of a window, in the upper half of each word; see `evomerge.weights.philox`.

    The lower halves contain garbage. `start` is a multiple of 8.

    Args:
        stretches: start of the window, and length and pitch of its stretches, in groups of 8.
        STRIDED: whether it has several stretches; then it has fewer than 2^32 groups.
    """
    group = tl.arange(0, BLOCK // 8)
    counter = stretches[0] + start // 8 + group.to(tl.int64)
    if STRIDED:
        number = ((start // 8).to(tl.uint32) + group.to(tl.uint32)) // stretches[1].to(tl.uint32)
        counter += number.to(tl.int64) * (stretches[2] - stretches[1])
    zero = tl.zeros((BLOCK // 8,), tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero, key0, key1, _ROUNDS
    )
    even = tl.interleave(tl.interleave(w1 << 16, w0 << 16), tl.interleave(w1, w0))
    odd = tl.interleave(tl.interleave(w3 << 16, w2 << 16), tl.interleave(w3, w2))
    return tl.interleave(even, odd)


@triton.jit
def _from(magnitude, threshold, after, cutoff, start, lanes, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a magnitude is at least `threshold`, or, from flat index `cutoff` on, at least `after`, the next float."""
    if EDGE:
        limit = tl.where(lanes < tl.minimum(tl.maximum(cutoff - start, 0), BLOCK).to(tl.int32), threshold, after)
    else:
        limit = tl.where(start < cutoff, threshold, after)
    return magnitude >= limit


@triton.jit
def pruned(
    delta,
    whole,
    real,
    keys,
    start,
    lanes,
    stretches,
    MODE: tl.constexpr,
    STRIDED: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of deltas, pruned with the numbers of one input (from `kernels._read_inputs`), whose key is at `keys`.

    The other arguments are as in `random_block`.
    """
    if MODE == MAGNITUDE:
        kept = _from(tl.abs(delta), real[1], real[2], whole[1], start, lanes, EDGE, BLOCK)
        delta = tl.where(kept, delta, 0.0)
    elif MODE == BAND:
        kept = _from(tl.abs(delta), real[1], real[2], whole[1], start, lanes, EDGE, BLOCK)
        outlier = _from(tl.abs(delta), real[3], real[4], whole[2], start, lanes, EDGE, BLOCK)
        delta = tl.where(kept & (outlier == 0), delta, 0.0)
    elif MODE >= RANDOM:
        # read here instead of once per chunk: the keys of all rounds and inputs would fill the registers
        key0, key1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
        numbers = random_block(key0, key1, start, stretches, STRIDED, BLOCK)
        if MODE == RANKED:
            ranks = tl.multiple_of(whole[4].to(tl.pointer_type(tl.uint16)), 16)
            more = (tl.load(ranks + start + lanes).to(tl.float32) * real[6]).to(tl.int32)
            kept = (numbers >> 16).to(tl.int32) - more <= (whole[3] >> 16).to(tl.int32)
        else:
            kept = numbers <= whole[3].to(tl.uint32)
        delta = tl.where(kept, delta, 0.0)
    return delta
