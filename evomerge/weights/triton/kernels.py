"""The merge on a GPU: one pass over base and sources, with the arithmetic of `evomerge.weights.fused.kernels` in the same order.

Every step is computed in float32 without fused multiply-adds and with correctly rounded divisions, bfloat16 is packed and unpacked by its
bits, and random numbers are Philox's, so a GPU and Triton's interpreter store exactly the same bits as the CPU. If a recipe asks for a lower
precision, the same steps are rounded to it as on the CPU.

One program computes one chunk: up to `CHUNK_BLOCKS` blocks of one row of the tables. Elements are counted within the window of the tensor that
is here, which is the whole tensor unless an engine has several processes; only random masks need positions in the whole tensor. Sources start on
16-byte boundaries and are padded with zeros to whole blocks (`resident.py`), so that they can be read without masks, with 16-byte loads and stores.
"""

import os

import triton
import triton.language as tl

from evomerge.weights.triton import INTERPRET
from evomerge.weights.triton.pruning import pruned

BLOCK = 2048
"""elements of a block: with 8 warps, each thread has 8, which is one 16-byte load of bfloat16"""

N_WARPS = 8

CHUNK_BLOCKS = 32
"""blocks of one program: enough to hide reading the tables, few enough to give every multiprocessor several programs"""

GROUP = 8
"""elements that share a counter in random masks, so that windows must consist of whole groups (a literal 8 inside the kernels)"""

OUTPUT_INTEGERS = 7
"""integers of a row before those of its inputs: address of the output, address of the base, first element, end, and, in groups, where the
window starts in the tensor, the length of its stretches and their pitch (see `evomerge.weights.windows`)"""

INPUT_INTEGERS = 7
"""integers of one input: address, cutoff, cutoff of the band's top, largest random word that keeps an element, address of the ranks, and
the two words of the key"""

OUTPUT_FLOATS = 2
"""divisor, scale"""

INPUT_FLOATS = 8
"""floats of one input: weight, threshold and the next float, threshold of the band's top (NaN = none) and the next float, scale, number of
additional random numbers that keep an element per rank, and the grid of its norm (see `evomerge.weights.fused.norms`)"""

INPUT_THRESHOLDS = (1, 3)
"""indices of the thresholds among these; each is followed by the next float"""

INPUT_SCALE = 5
"""index of the scale among these"""

# values that kernels read must be compile-time constants
_OUTPUT_INTEGERS, _INPUT_INTEGERS = tl.constexpr(OUTPUT_INTEGERS), tl.constexpr(INPUT_INTEGERS)
_OUTPUT_FLOATS, _INPUT_FLOATS = tl.constexpr(OUTPUT_FLOATS), tl.constexpr(INPUT_FLOATS)
_KEYS = tl.constexpr(INPUT_INTEGERS - 2)
_SCALE, _GRID = tl.constexpr(INPUT_SCALE), tl.constexpr(INPUT_FLOATS - 1)

# same numbers as in evomerge.weights.fused.blocks, checked by a test
BF16, F32, F16, F32_AS_BF16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

_INTERPRETED = tl.constexpr(os.environ.get(INTERPRET) == "1")

NO_BASE = -1
"""the kind of a missing base"""

KIND_BITS = 2
"""number of bits per input in `KINDS` (a literal 2 inside the kernels, as the interpreter requires)"""


@triton.jit
def _load(address, start, lanes, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the tensor at `address` from element `start` on, as float32."""
    if KIND == BF16:
        words = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16) + start // 2
        words = tl.load(words + tl.arange(0, BLOCK // 2))
        value = tl.interleave(words << 16, words & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif KIND == F16:
        value = tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16) + start + lanes).to(tl.float32)
    else:
        value = tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + start + lanes)
    return value


@triton.jit
def _magnitude(value):
    """The bits of |value|; as integers, they are ordered like the magnitudes."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _with_sign(value, sign):
    """`value`, negated where `sign` has the bits of -0 instead of 0."""
    return (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _bf16(value):
    """The 16 bits of `value` in bfloat16, rounded to nearest even. Triton's interpreter does not round, so the bits are rounded explicitly there."""
    if _INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        bits = value.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    return bits


@triton.jit
def _as_bf16(value):
    """`value` rounded to bfloat16."""
    return (_bf16(value).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def rounded(value, PRECISION: tl.constexpr):
    """`value` rounded to PRECISION."""
    if PRECISION == BF16:
        value = _as_bf16(value)
    elif PRECISION == F16:
        value = value.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def _load_rounded(address, start, lanes, KIND: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    value = _load(address, start, lanes, KIND, BLOCK)
    if KIND != PRECISION:
        value = rounded(value, PRECISION)
    return value


@triton.jit
def _store(address, start, lanes, inside, value, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Store a block, rounded to nearest even, where `inside` (None = everywhere)."""
    if KIND == BF16:
        pointer = address.to(tl.pointer_type(tl.uint16))
        stored = _bf16(value)
    elif KIND == F16:
        pointer = address.to(tl.pointer_type(tl.float16))
        stored = value.to(tl.float16)
    elif KIND == F32_AS_BF16:
        pointer = address.to(tl.pointer_type(tl.float32))
        stored = _as_bf16(value)
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
        stored = value
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + start + lanes, stored, mask=inside)


@triton.jit
def _read_inputs(integers, floats, K: tl.constexpr):
    """All numbers of a row's inputs except the keys, so that they are read once per chunk."""
    whole = ()
    real = ()
    for k in tl.static_range(K):
        at = integers + k * _INPUT_INTEGERS
        whole = whole + ((tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)),)
        at = floats + k * _INPUT_FLOATS
        cuts = (tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))
        real = real + ((tl.load(at),) + cuts + (tl.load(at + 5), tl.load(at + 6)),)
    return whole, real


@triton.jit
def _cut_inside(whole, first, end, K: tl.constexpr):
    """Whether a cutoff of any input is inside elements [first, end)."""
    inside = first > end
    for k in tl.static_range(K):
        inside = inside | ((whole[k][1] > first) & (whole[k][1] < end))
        inside = inside | ((whole[k][2] > first) & (whole[k][2] < end))
    return inside


@triton.jit
def _weighted(
    k: tl.constexpr,
    base,
    start,
    lanes,
    inputs,
    whole,
    real,
    stretches,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    MODE: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    STRIDED: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of input k (with a base: of its pruned difference from `base`) times its weight."""
    value = _load_rounded(whole[k][0], start, lanes, (KINDS >> (2 * k)) & 3, PRECISION, BLOCK)
    if BASE >= 0:
        keys = inputs + k * _INPUT_INTEGERS + _KEYS
        value = rounded(value - base, PRECISION)
        value = pruned(value, whole[k], real[k], keys, start, lanes, stretches, MODE, STRIDED, EDGE, BLOCK)
        if RESCALE:
            value = rounded(value * real[k][_SCALE], PRECISION)
        value = rounded(value * real[k][0], PRECISION)
    else:
        value = value * real[k][0]
    return value


@triton.jit
def _agreeing(values, total, real, K: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Sum of the values with the sign of `total`, divided by the sum of their weights if NORMALIZE.

    `total` cannot be -0: it started from 0, and no value is finer than the precision to which it is rounded.
    """
    sign = total.to(tl.uint32, bitcast=True) & 0x80000000
    agreed, weights = 0.0, 0.0
    for k in tl.static_range(K):
        value = _with_sign(values[k], sign)
        part = tl.where(value > 0.0, value, 0.0)
        agreed = part if k == 0 else agreed + part
        if NORMALIZE:
            weight = tl.where(value > 0.0, real[k][0], 0.0)
            weights = weight if k == 0 else weights + weight
    agreed = rounded(_with_sign(agreed, sign), PRECISION)
    if NORMALIZE:
        weights = rounded(weights, PRECISION)
        agreed = rounded(tl.div_rn(agreed, tl.where(weights == 0.0, 1.0, weights)), PRECISION)
    return agreed


@triton.jit
def _merge_blocks(
    first_block,
    end_block,
    out_address,
    base_address,
    first,
    end,
    divisor,
    scale,
    inputs,
    whole,
    real,
    stretches,
    K: tl.constexpr,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    MODE: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DIVIDE: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute blocks [first_block, end_block) and return the bits of the largest magnitude of each lane.

    EDGE: whether an end of the output or a cutoff may be inside; if not, no masks are needed. The other arguments are as in `merge_chunks`.
    """
    lanes = tl.arange(0, BLOCK)
    worst = tl.zeros((BLOCK,), tl.float32)
    for block in range(first_block, end_block):
        start = block * BLOCK
        total = tl.zeros((BLOCK,), tl.float32)
        values = ()
        base = None
        if BASE >= 0:
            base = _load_rounded(base_address, start, lanes, BASE, PRECISION, BLOCK)
        for k in tl.static_range(K):
            value = _weighted(
                k, base, start, lanes, inputs, whole, real, stretches,
                KINDS, BASE, MODE, RESCALE, PRECISION, STRIDED, EDGE, BLOCK,
            )  # fmt: skip
            total = total + value
            if ELECT:
                values = values + (value,)
        if BASE >= 0:
            total = rounded(total, PRECISION)
        if ELECT:
            total = _agreeing(values, total, real, K, NORMALIZE, PRECISION)
        if DIVIDE:
            total = tl.div_rn(total, tl.zeros((BLOCK,), tl.float32) + divisor)
        total = rounded(rounded(total, PRECISION) * scale, PRECISION)
        if BASE >= 0:
            total = rounded(total + base, PRECISION)
        if EDGE:
            inside = (lanes >= (first - start)) & (lanes < (end - start))
            worst = tl.maximum(worst, tl.where(inside, tl.abs(total), 0.0), propagate_nan=tl.PropagateNan.ALL)
        else:
            inside = None
            worst = tl.maximum(worst, tl.abs(total), propagate_nan=tl.PropagateNan.ALL)
        _store(out_address, start, lanes, inside, total, OUT, ALIGNED)
    return worst


@triton.jit
def merge_chunks(
    chunks,
    integers,
    floats,
    largest,
    K: tl.constexpr,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    MODE: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DIVIDE: tl.constexpr,
    RESCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute chunk `program_id` and write the bits of its largest magnitude (NaN above all) into `largest`.

    Args:
        chunks: (n, 3) int64: row of the tables, first block, block after the last.
        integers: (rows, OUTPUT_INTEGERS + K * INPUT_INTEGERS) int64.
        floats: (rows, OUTPUT_FLOATS + K * INPUT_FLOATS) float32.
        largest: (n,) int32.
        K: number of inputs.
        KINDS: how each input is stored, KIND_BITS bits each, the first in the lowest.
        BASE: how the base is stored, or NO_BASE.
        OUT: how the output is stored.
        MODE: how inputs are pruned; inputs that are not pruned have numbers that keep everything.
        ELECT, NORMALIZE: sum over the elected sign, divide by the weights that agree.
        DIVIDE, RESCALE: whether any row's divisor, or any input's scale, is not 1.
        PRECISION: the kind to which arithmetic rounds, F32 for no rounding; without a base, only inputs and result are rounded.
        ALIGNED: whether all outputs start on 16-byte boundaries.
        STRIDED: whether windows of several stretches are masked at random.
        BLOCK: number of elements of a block.
    """
    chunk = tl.program_id(0)
    row = tl.load(chunks + 3 * chunk)
    first_block, end_block = tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    integers += row * (_OUTPUT_INTEGERS + K * _INPUT_INTEGERS)
    floats += row * (_OUTPUT_FLOATS + K * _INPUT_FLOATS)
    out, base = tl.load(integers), tl.load(integers + 1)
    first, end = tl.load(integers + 2), tl.load(integers + 3)
    stretches = (tl.load(integers + 4), tl.load(integers + 5), tl.load(integers + 6))
    divisor, scale = tl.load(floats), tl.load(floats + 1)
    inputs = integers + _OUTPUT_INTEGERS
    whole, real = _read_inputs(inputs, floats + _OUTPUT_FLOATS, K)
    start, stop = first_block * BLOCK, end_block * BLOCK
    if (start < first) | (stop > end) | _cut_inside(whole, start, stop, K):
        worst = _merge_blocks(
            first_block, end_block, out, base, first, end, divisor, scale, inputs, whole, real, stretches,
            K, KINDS, BASE, OUT, MODE, ELECT, NORMALIZE, DIVIDE, RESCALE, PRECISION, ALIGNED, STRIDED, True, BLOCK,
        )  # fmt: skip
    else:
        worst = _merge_blocks(
            first_block, end_block, out, base, first, end, divisor, scale, inputs, whole, real, stretches,
            K, KINDS, BASE, OUT, MODE, ELECT, NORMALIZE, DIVIDE, RESCALE, PRECISION, ALIGNED, STRIDED, False, BLOCK,
        )  # fmt: skip
    tl.store(largest + chunk, tl.max(_magnitude(worst), axis=0))


@triton.jit
def pruned_l1_chunks(
    chunks,
    integers,
    floats,
    norms,
    K: tl.constexpr,
    KINDS: tl.constexpr,
    BASE: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the L1 norm (float64) of each input's pruned delta within chunk `program_id` into `norms` (n, K).

    The other arguments are those of `merge_chunks`; outputs, weights and scales do not matter.
    """
    chunk = tl.program_id(0)
    row = tl.load(chunks + 3 * chunk)
    first_block, end_block = tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    integers += row * (_OUTPUT_INTEGERS + K * _INPUT_INTEGERS)
    floats += row * (_OUTPUT_FLOATS + K * _INPUT_FLOATS)
    base_address, stretches = (
        tl.load(integers + 1),
        (tl.load(integers + 4), tl.load(integers + 5), tl.load(integers + 6)),
    )
    inputs = integers + _OUTPUT_INTEGERS
    whole, real = _read_inputs(inputs, floats + _OUTPUT_FLOATS, K)
    lanes = tl.arange(0, BLOCK)
    for k in tl.static_range(K):
        total = tl.zeros((BLOCK,), tl.float64)
        grid = tl.load(floats + _OUTPUT_FLOATS + k * _INPUT_FLOATS + _GRID).to(tl.float64)
        for block in range(first_block, end_block):
            start = block * BLOCK
            value = _load_rounded(whole[k][0], start, lanes, (KINDS >> (2 * k)) & 3, PRECISION, BLOCK)
            value = rounded(value - _load_rounded(base_address, start, lanes, BASE, PRECISION, BLOCK), PRECISION)
            keys = inputs + k * _INPUT_INTEGERS + _KEYS
            value = pruned(value, whole[k], real[k], keys, start, lanes, stretches, MODE, False, True, BLOCK)
            total = total + ((tl.abs(value).to(tl.float64) + grid) - grid)
        tl.store(norms + chunk * K + k, tl.sum(total, axis=0))


@triton.jit
def answer_one(answer):
    """Write 1 into `answer`, (1,) int32, to test whether kernels run at all."""
    tl.store(answer, 1)
