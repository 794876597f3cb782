"""Vectors in compiled code: `LANES` float32, uint32 or boolean values as one value that stays in registers.

The compiler's own vectoriser gives up on loops over many arrays; these types make the vectors explicit. Arithmetic is IEEE float32,
never contracted or reordered, so results do not depend on the processor.

The first half of the lanes holds elements 0, 2, 4, ... of a window of consecutive elements, the second half 1, 3, 5, ...:
two adjacent bfloat16 values are then the halves of one 32-bit word, and a shift or a mask converts each to float32.

numba's cache of compiled code only checks the file of a kernel: after a change here, touch the kernels' files.
"""

import operator
from collections.abc import Mapping
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from evomerge.weights.fused.emits import emits
from evomerge.weights.philox import MASK_ROUNDS, MULTIPLIERS, WEYL

LANES = 64
"""elements of a window: four registers of 512 bits, so that the arithmetic of one hides the latency of another. The same on
every processor, because sums over lanes depend on it"""

_HALF = LANES // 2
_COUNTERS = LANES // 8
"""Philox counters of a window: each gives four words, for eight elements of a mask"""


class Vector(types.Type):  # type: ignore[misc]
    """The compiled type of `LANES` scalars."""

    def __init__(self, scalar: types.Type) -> None:
        self.scalar = scalar
        super().__init__(f"Vector({scalar})")


FLOATS, WORDS, HALVES, TRUTHS = [
    Vector(scalar) for scalar in (types.float32, types.uint32, types.uint16, types.boolean)
]
SUMS = Vector(types.float64)
"""one float64 running sum per lane"""


_FLOAT, _DOUBLE, _I1, _I16, _I32, _I64 = ir.FloatType(), ir.DoubleType(), *map(ir.IntType, (1, 16, 32, 64))
_LLVM_OF = {types.float32: _FLOAT, types.float64: _DOUBLE, types.uint32: _I32, types.uint16: _I16, types.boolean: _I1}
_BITS = ir.IntType(LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(_LLVM_OF[vector.scalar], LANES))


def _vector(scalar: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(scalar, count)


def _constant(scalar: ir.Type, value: int | float, count: int = LANES) -> ir.Constant:
    return ir.Constant(_vector(scalar, count), [value] * count)


def _splat(builder: Any, scalar: Any, count: int = LANES) -> Any:
    vector = _vector(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), _constant(_I32, 0, count))


def _pointer(builder: Any, address: Any, element: ir.Type, count: int = LANES) -> Any:
    return builder.inttoptr(address, _vector(element, count).as_pointer())


def _shuffled(builder: Any, a: Any, b: Any, numbers: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_vector(_I32, len(numbers)), numbers))


_IN_LANES = [*range(0, LANES, 2), *range(1, LANES, 2)]
"""lane -> element"""

_IN_MEMORY = [element // 2 + _HALF * (element % 2) for element in range(LANES)]
"""element -> lane"""


@numba.njit(cache=True, nogil=True)
def lane_of(element):  # type: ignore[no-untyped-def]
    """The lane of an element of a window."""
    return element // 2 + _HALF * (element % 2)


@emits(FLOATS, types.float32)
def floats(builder: Any, value: Any) -> Any:
    """The float32 `value` in every lane."""
    return _splat(builder, value)


@emits(WORDS, types.uint32)
def words(builder: Any, value: Any) -> Any:
    """The uint32 `value` in every lane."""
    return _splat(builder, value)


@emits(HALVES, types.uint16)
def halves(builder: Any, value: Any) -> Any:
    """The uint16 `value` in every lane."""
    return _splat(builder, value)


@emits(SUMS)
def no_sums(builder: Any) -> Any:
    """0 in every lane."""
    return _constant(_DOUBLE, 0.0)


@emits(FLOATS, types.int64)
def load_lanes(builder: Any, address: Any) -> Any:
    """The float32 values at `address`, stored in the order of lanes."""
    return builder.load(_pointer(builder, address, _FLOAT), align=4)


@emits(types.void, types.int64, FLOATS)
def store_lanes(builder: Any, address: Any, value: Any) -> Any:
    """Store float32 values in the order of lanes."""
    builder.store(value, _pointer(builder, address, _FLOAT), align=4)


@emits(FLOATS, types.int64)
def load_float32(builder: Any, address: Any) -> Any:
    """The float32 values at `address`."""
    value = builder.load(_pointer(builder, address, _FLOAT), align=4)
    return _shuffled(builder, value, value, _IN_LANES)


@emits(types.void, types.int64, FLOATS)
def store_float32(builder: Any, address: Any, value: Any) -> Any:
    """Store float32 values."""
    ordered = _shuffled(builder, value, value, _IN_MEMORY)
    builder.store(ordered, _pointer(builder, address, _FLOAT), align=4)


@emits(FLOATS, types.int64)
def load_bfloat16(builder: Any, address: Any) -> Any:
    """The bfloat16 values at `address` as float32."""
    pairs = builder.load(_pointer(builder, address, _I32, _HALF), align=2)
    even = builder.shl(pairs, _constant(_I32, 16, _HALF))
    odd = builder.and_(pairs, _constant(_I32, 0xFFFF0000, _HALF))
    return builder.bitcast(_shuffled(builder, even, odd, list(range(LANES))), _vector(_FLOAT))


@emits(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> Any:
    """Prefetch the 128 bytes at `address`, which need not be valid."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in (0, 64):
        place = builder.inttoptr(builder.add(address, ir.Constant(_I64, line)), byte)
        # arguments: read access, highest locality, data cache
        builder.call(function, [place, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


@emits(FLOATS, types.int64)
def load_float16(builder: Any, address: Any) -> Any:
    """The float16 values at `address` as float32."""
    halves = builder.load(_pointer(builder, address, _I16), align=2)
    bits = builder.zext(_shuffled(builder, halves, halves, _IN_LANES), _vector(_I32))
    # moves exponent and mantissa into place and corrects the bias; exact for subnormals too
    magnitude = builder.shl(builder.and_(bits, _constant(_I32, 0x7FFF)), _constant(_I32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, _vector(_FLOAT)), _constant(_FLOAT, 2.0**112))
    sign = builder.shl(builder.and_(bits, _constant(_I32, 0x8000)), _constant(_I32, 16))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, _vector(_I32)), sign), _vector(_FLOAT))


@emits(FLOATS, types.int64)
def load_uint16(builder: Any, address: Any) -> Any:
    """The uint16 values at `address` as float32."""
    pairs = builder.load(_pointer(builder, address, _I32, _HALF), align=2)
    even = builder.and_(pairs, _constant(_I32, 0xFFFF, _HALF))
    odd = builder.lshr(pairs, _constant(_I32, 16, _HALF))
    return builder.sitofp(_shuffled(builder, even, odd, list(range(LANES))), _vector(_FLOAT))


@emits(types.void, types.int64, WORDS)
def store_upper_halves(builder: Any, address: Any, value: Any) -> Any:
    """Store the upper 16 bits of every lane."""
    even = _shuffled(builder, value, value, list(range(_HALF)))
    odd = _shuffled(builder, value, value, list(range(_HALF, LANES)))
    pairs = builder.or_(
        builder.lshr(even, _constant(_I32, 16, _HALF)), builder.and_(odd, _constant(_I32, 0xFFFF0000, _HALF))
    )
    builder.store(pairs, _pointer(builder, address, _I32, _HALF), align=2)


@emits(TRUTHS, types.int64)
def load_truths(builder: Any, address: Any) -> Any:
    """Load booleans written by `store_truths`."""
    return builder.bitcast(builder.load(builder.inttoptr(address, _BITS.as_pointer()), align=4), _vector(_I1))


@emits(types.void, types.int64, TRUTHS)
def store_truths(builder: Any, address: Any, value: Any) -> Any:
    """Store booleans as `LANES` bits, lane 0 in the lowest bit."""
    builder.store(builder.bitcast(value, _BITS), builder.inttoptr(address, _BITS.as_pointer()), align=4)


@emits(WORDS, FLOATS)
def bits_of(builder: Any, value: Any) -> Any:
    """The bits of float32 values."""
    return builder.bitcast(value, _vector(_I32))


@emits(FLOATS, WORDS)
def from_bits(builder: Any, value: Any) -> Any:
    """The float32 values with these bits."""
    return builder.bitcast(value, _vector(_FLOAT))


@intrinsic  # type: ignore[untyped-decorator]
def select(typing_context: Any, truth: Any, yes: Any, no: Any) -> Any:
    """`yes` in the lanes where `truth`, `no` in the others."""
    return yes(TRUTHS, yes, no), lambda context, builder, signature, values: builder.select(*values)


@emits(HALVES, FLOATS)
def to_halves(builder: Any, value: Any) -> Any:
    """Non-negative float32 values below 2^16, truncated to integers."""
    return builder.trunc(builder.fptosi(value, _vector(_I32)), _vector(_I16))


@emits(HALVES, HALVES, HALVES)
def lessened(builder: Any, value: Any, by: Any) -> Any:
    """Saturating difference of uint16 values: 0 where `by` is larger."""
    kind = ir.FunctionType(_vector(_I16), [_vector(_I16), _vector(_I16)])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.usub.sat.v{LANES}i16"), [value, by])


@emits(types.void, types.int64, HALVES)
def store_halves(builder: Any, address: Any, value: Any) -> Any:
    """Store uint16 values in the order of lanes."""
    builder.store(value, _pointer(builder, address, _I16), align=2)


@emits(SUMS, SUMS, FLOATS, types.float64)
def add_on_grid(builder: Any, sums: Any, value: Any, grid: Any) -> Any:
    """`sums` plus float32 values, rounded by adding and subtracting the float64 `grid`; see `evomerge.weights.fused.norms`."""
    grids = _splat(builder, grid)
    moved = builder.fadd(builder.fpext(value, _vector(_DOUBLE)), grids)
    return builder.fadd(sums, builder.fsub(moved, grids))


@emits(SUMS, SUMS, FLOATS)
def add_to_sums(builder: Any, sums: Any, value: Any) -> Any:
    """`sums` plus float32 values."""
    return builder.fadd(sums, builder.fpext(value, _vector(_DOUBLE)))


@emits(types.float64, SUMS)
def total_sum(builder: Any, sums: Any) -> Any:
    """The sum of all lanes, starting with lane 0."""
    total = ir.Constant(_DOUBLE, 0.0)
    for lane in range(LANES):
        total = builder.fadd(total, builder.extract_element(sums, ir.Constant(_I32, lane)))
    return total


@emits(HALVES, types.uint64, types.uint64, types.int64)
def random_halves(builder: Any, key0: Any, key1: Any, start: Any) -> Any:
    """The random numbers of masks for the window that starts at flat element `start`, see `evomerge.weights.philox`.

    Args:
        key0, key1: the key, below 2^32.
        start: a multiple of `LANES`.
    """
    low, half, zero = (_constant(_I64, value, _COUNTERS) for value in (0xFFFFFFFF, 32, 0))
    first = _splat(builder, builder.lshr(start, ir.Constant(_I64, 3)), _COUNTERS)
    counter = builder.add(first, ir.Constant(_vector(_I64, _COUNTERS), list(range(_COUNTERS))))

    def round_of(number: int, word: list[Any]) -> tuple[list[Any], list[Any]]:
        """Products of words 2 and 0, and the words with which their upper halves are xored."""
        products = [
            builder.mul(builder.and_(word[place], low), _constant(_I64, MULTIPLIERS[side], _COUNTERS))
            for place, side in ((2, 1), (0, 0))
        ]
        keys = [
            builder.add(key, ir.Constant(_I64, number * weyl)) for key, weyl in zip((key0, key1), WEYL, strict=True)
        ]
        return products, [
            builder.xor(word[place], _splat(builder, key, _COUNTERS)) for place, key in zip((1, 3), keys, strict=True)
        ]

    # only the lower halves are used; the upper ones contain garbage, which later masks remove
    word = [counter, builder.lshr(counter, half), zero, zero]
    for number in range(MASK_ROUNDS - 1):
        products, others = round_of(number, word)
        upper = [builder.xor(builder.lshr(a, half), b) for a, b in zip(products, others, strict=True)]
        word = [upper[0], products[0], upper[1], products[1]]
    # the last round leaves each product where it is: w1 + 2^32 w0 and w3 + 2^32 w2
    products, others = round_of(MASK_ROUNDS - 1, word)
    pairs = [builder.xor(a, builder.shl(b, half)) for a, b in zip(products, others, strict=True)]
    even, odd = (builder.bitcast(pair, _vector(_I16, _HALF)) for pair in pairs)
    return _shuffled(builder, even, odd, list(range(LANES)))


@emits(types.uint32, WORDS)
def largest_word(builder: Any, value: Any) -> Any:
    """The largest lane of unsigned words."""
    name = f"llvm.vector.reduce.umax.v{LANES}i32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, [_vector(_I32)]), name)
    return builder.call(function, [value])


def _register(operation: Any, methods: Mapping[Vector, str], *, compares: str = "") -> None:
    """Define `operation` for pairs of vectors: type of lane -> the builder's method; for comparisons, `compares` is the operator."""

    def code_for(vector: Vector, method: str) -> Any:
        def operate(builder: Any, a: Any, b: Any) -> Any:
            return getattr(builder, method)(*([compares] if compares else []), a, b)

        return emits(TRUTHS if compares else vector, vector, vector)(operate)

    known = {vector: code_for(vector, method) for vector, method in methods.items()}

    @overload(operation)
    def operated(a, b):  # type: ignore[no-untyped-def]
        operate = known.get(a) if a == b else None
        return None if operate is None else lambda a, b: operate(a, b)


_register(operator.add, {FLOATS: "fadd", WORDS: "add"})
_register(operator.sub, {FLOATS: "fsub"})
_register(operator.mul, {FLOATS: "fmul"})
_register(operator.truediv, {FLOATS: "fdiv"})
_register(operator.and_, {WORDS: "and_"})
_register(operator.or_, {WORDS: "or_"})
_register(operator.xor, {WORDS: "xor"})
_register(operator.rshift, {WORDS: "lshr"})
_register(operator.gt, {FLOATS: "fcmp_ordered", WORDS: "icmp_unsigned"}, compares=">")
_register(operator.ge, {FLOATS: "fcmp_ordered", WORDS: "icmp_unsigned"}, compares=">=")
_register(operator.lt, {FLOATS: "fcmp_ordered", WORDS: "icmp_unsigned", HALVES: "icmp_unsigned"}, compares="<")
_register(operator.eq, {FLOATS: "fcmp_ordered"}, compares="==")
