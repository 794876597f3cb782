"""Vectors inside compiled code: `LANES` float32 or uint32 values, or truths, as one value that stays in registers.

The compiler's own vectoriser gives up on loops over many arrays; these types say what is meant. Arithmetic is IEEE float32,
never contracted or reordered, so results do not depend on the processor.

The first half of the lanes holds elements 0, 2, 4, ... of a window of consecutive elements, the second half 1, 3, 5, ...:
two bfloat16 neighbours are then the halves of one 32-bit word, and a shift or a mask makes each a float32.

numba's cache of compiled code looks at the file of a kernel alone: after a change here, touch the kernels' files.
"""

import operator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from evomerge.weights.philox import MASK_ROUNDS, MULTIPLIERS, WEYL

LANES = 64
"""elements of a window: four registers of 512 bits, so that one window's arithmetic hides the latency of another's. The same on
every processor, because sums over lanes depend on it"""

_HALF = LANES // 2
_COUNTERS = LANES // 8
"""Philox counters of a window: each makes four words, and eight elements of a mask"""


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


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        scalar = {
            types.float32: ir.FloatType(),
            types.float64: ir.DoubleType(),
            types.uint32: ir.IntType(32),
            types.uint16: ir.IntType(16),
            types.boolean: ir.IntType(1),
        }
        super().__init__(manager, vector, ir.VectorType(scalar[vector.scalar], LANES))


_FLOAT, _DOUBLE, _I1, _I16, _I32, _I64 = (
    ir.FloatType(), ir.DoubleType(), ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64),
)  # fmt: skip

_BITS = ir.IntType(LANES)


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


@intrinsic  # type: ignore[untyped-decorator]
def floats(typing_context: Any, value: Any) -> Any:
    """The float32 `value` in every lane."""
    return FLOATS(types.float32), lambda context, builder, signature, values: _splat(builder, values[0])


@intrinsic  # type: ignore[untyped-decorator]
def words(typing_context: Any, value: Any) -> Any:
    """The uint32 `value` in every lane."""
    return WORDS(types.uint32), lambda context, builder, signature, values: _splat(builder, values[0])


@intrinsic  # type: ignore[untyped-decorator]
def halves(typing_context: Any, value: Any) -> Any:
    """The uint16 `value` in every lane."""
    return HALVES(types.uint16), lambda context, builder, signature, values: _splat(builder, values[0])


@intrinsic  # type: ignore[untyped-decorator]
def no_sums(typing_context: Any) -> Any:
    """0 in every lane."""
    return SUMS(), lambda context, builder, signature, values: _constant(_DOUBLE, 0.0)


@intrinsic  # type: ignore[untyped-decorator]
def load_lanes(typing_context: Any, address: Any) -> Any:
    """float32 values at `address`, stored in the order of lanes."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_pointer(builder, values[0], _FLOAT), align=4)

    return FLOATS(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def store_lanes(typing_context: Any, address: Any, value: Any) -> Any:
    """Stores float32 values in the order of lanes."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], _pointer(builder, values[0], _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, FLOATS), code


@intrinsic  # type: ignore[untyped-decorator]
def load_float32(typing_context: Any, address: Any) -> Any:
    """The float32 values at `address`."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = builder.load(_pointer(builder, values[0], _FLOAT), align=4)
        return _shuffled(builder, value, value, _IN_LANES)

    return FLOATS(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def store_float32(typing_context: Any, address: Any, value: Any) -> Any:
    """Stores float32 values."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        ordered = _shuffled(builder, values[1], values[1], _IN_MEMORY)
        builder.store(ordered, _pointer(builder, values[0], _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, FLOATS), code


@intrinsic  # type: ignore[untyped-decorator]
def load_bfloat16(typing_context: Any, address: Any) -> Any:
    """The bfloat16 values at `address` as float32."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pairs = builder.load(_pointer(builder, values[0], _I32, _HALF), align=2)
        even = builder.shl(pairs, _constant(_I32, 16, _HALF))
        odd = builder.and_(pairs, _constant(_I32, 0xFFFF0000, _HALF))
        return builder.bitcast(_shuffled(builder, even, odd, list(range(LANES))), _vector(_FLOAT))

    return FLOATS(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the 128 bytes at `address`, which need not exist, before they are needed."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for line in (0, 64):
            place = builder.inttoptr(builder.add(values[0], ir.Constant(_I64, line)), byte)
            # to read, into the nearest cache, data
            builder.call(function, [place, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def load_float16(typing_context: Any, address: Any) -> Any:
    """The float16 values at `address` as float32."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        halves = builder.load(_pointer(builder, values[0], _I16), align=2)
        bits = builder.zext(_shuffled(builder, halves, halves, _IN_LANES), _vector(_I32))
        # exponent and mantissa moved into place, then the bias corrected: exact for subnormals too
        magnitude = builder.shl(builder.and_(bits, _constant(_I32, 0x7FFF)), _constant(_I32, 13))
        scaled = builder.fmul(builder.bitcast(magnitude, _vector(_FLOAT)), _constant(_FLOAT, 2.0**112))
        sign = builder.shl(builder.and_(bits, _constant(_I32, 0x8000)), _constant(_I32, 16))
        return builder.bitcast(builder.or_(builder.bitcast(scaled, _vector(_I32)), sign), _vector(_FLOAT))

    return FLOATS(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def load_uint16(typing_context: Any, address: Any) -> Any:
    """The uint16 values at `address` as float32."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pairs = builder.load(_pointer(builder, values[0], _I32, _HALF), align=2)
        even = builder.and_(pairs, _constant(_I32, 0xFFFF, _HALF))
        odd = builder.lshr(pairs, _constant(_I32, 16, _HALF))
        return builder.sitofp(_shuffled(builder, even, odd, list(range(LANES))), _vector(_FLOAT))

    return FLOATS(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def store_upper_halves(typing_context: Any, address: Any, value: Any) -> Any:
    """Stores the upper 16 bits of every lane."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        even = _shuffled(builder, values[1], values[1], list(range(_HALF)))
        odd = _shuffled(builder, values[1], values[1], list(range(_HALF, LANES)))
        pairs = builder.or_(
            builder.lshr(even, _constant(_I32, 16, _HALF)), builder.and_(odd, _constant(_I32, 0xFFFF0000, _HALF))
        )
        builder.store(pairs, _pointer(builder, values[0], _I32, _HALF), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, WORDS), code


@intrinsic  # type: ignore[untyped-decorator]
def load_truths(typing_context: Any, address: Any) -> Any:
    """Truths that `store_truths` wrote."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.load(builder.inttoptr(values[0], _BITS.as_pointer()), align=4), _vector(_I1))

    return TRUTHS(types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def store_truths(typing_context: Any, address: Any, value: Any) -> Any:
    """Stores truths as 32 bits, lane 0 the lowest."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(builder.bitcast(values[1], _BITS), builder.inttoptr(values[0], _BITS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, TRUTHS), code


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(typing_context: Any, value: Any) -> Any:
    """The patterns of float32 values."""
    return WORDS(FLOATS), lambda context, builder, signature, values: builder.bitcast(values[0], _vector(_I32))


@intrinsic  # type: ignore[untyped-decorator]
def from_bits(typing_context: Any, value: Any) -> Any:
    """The float32 values of patterns."""
    return FLOATS(WORDS), lambda context, builder, signature, values: builder.bitcast(values[0], _vector(_FLOAT))


@intrinsic  # type: ignore[untyped-decorator]
def select(typing_context: Any, truth: Any, yes: Any, no: Any) -> Any:
    """`yes` in the lanes where `truth`, `no` in the others."""
    return yes(TRUTHS, yes, no), lambda context, builder, signature, values: builder.select(*values)


@intrinsic  # type: ignore[untyped-decorator]
def to_halves(typing_context: Any, value: Any) -> Any:
    """Non-negative float32 values below 2^16, cut off to integers."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.trunc(builder.fptosi(values[0], _vector(_I32)), _vector(_I16))

    return HALVES(FLOATS), code


@intrinsic  # type: ignore[untyped-decorator]
def lessened(typing_context: Any, value: Any, by: Any) -> Any:
    """uint16 values less others, 0 where these are larger."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(_vector(_I16), [_vector(_I16), _vector(_I16)])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.usub.sat.v{LANES}i16"), values)

    return HALVES(HALVES, HALVES), code


@intrinsic  # type: ignore[untyped-decorator]
def store_halves(typing_context: Any, address: Any, value: Any) -> Any:
    """Stores uint16 values in the order of lanes."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], _pointer(builder, values[0], _I16), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, HALVES), code


@intrinsic  # type: ignore[untyped-decorator]
def add_on_grid(typing_context: Any, sums: Any, value: Any, grid: Any) -> Any:
    """`sums` plus float32 values, to which the float64 `grid` is added and taken away again; see `evomerge.weights.fused.norms`."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        grids = _splat(builder, values[2])
        moved = builder.fadd(builder.fpext(values[1], _vector(_DOUBLE)), grids)
        return builder.fadd(values[0], builder.fsub(moved, grids))

    return SUMS(SUMS, FLOATS, types.float64), code


@intrinsic  # type: ignore[untyped-decorator]
def add_to_sums(typing_context: Any, sums: Any, value: Any) -> Any:
    """`sums` plus float32 values."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fadd(values[0], builder.fpext(values[1], _vector(_DOUBLE)))

    return SUMS(SUMS, FLOATS), code


@intrinsic  # type: ignore[untyped-decorator]
def total_sum(typing_context: Any, sums: Any) -> Any:
    """The lanes added up, lane 0 first."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        total = ir.Constant(_DOUBLE, 0.0)
        for lane in range(LANES):
            total = builder.fadd(total, builder.extract_element(values[0], ir.Constant(_I32, lane)))
        return total

    return types.float64(SUMS), code


@intrinsic  # type: ignore[untyped-decorator]
def random_halves(typing_context: Any, key0: Any, key1: Any, start: Any) -> Any:
    """What masks decide by in the window that starts at flat element `start`, see `evomerge.weights.philox`.

    Args:
        key0, key1: the key, below 2^32.
        start: a multiple of `LANES`.
    """

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        low, half, zero = (_constant(_I64, value, _COUNTERS) for value in (0xFFFFFFFF, 32, 0))
        first = _splat(builder, builder.lshr(values[2], ir.Constant(_I64, 3)), _COUNTERS)
        counter = builder.add(first, ir.Constant(_vector(_I64, _COUNTERS), list(range(_COUNTERS))))

        def round_of(number: int, word: list[Any]) -> tuple[list[Any], list[Any]]:
            """Products of words 2 and 0, and what their upper halves are xored with."""
            products = [
                builder.mul(builder.and_(word[place], low), _constant(_I64, MULTIPLIERS[side], _COUNTERS))
                for place, side in ((2, 1), (0, 0))
            ]
            keys = [builder.add(values[side], ir.Constant(_I64, number * WEYL[side])) for side in (0, 1)]
            return products, [
                builder.xor(word[place], _splat(builder, key, _COUNTERS))
                for place, key in zip((1, 3), keys, strict=True)
            ]

        # only the lower halves count: the upper ones hold rubbish, which the next masks remove
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

    return HALVES(types.uint64, types.uint64, types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def largest_word(typing_context: Any, value: Any) -> Any:
    """The largest lane of unsigned words."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = f"llvm.vector.reduce.umax.v{LANES}i32"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, [_vector(_I32)]), name)
        return builder.call(function, values)

    return types.uint32(WORDS), code


def _register(
    function: Any,
    of_floats: str | None,
    of_words: str | None,
    of_truths: str | None = None,
    *,
    of_halves: str | None = None,
    compares: str = "",
) -> None:
    """Gives two vectors the operator `function`: the builder's methods for each kind of lane."""

    def code_for(name: str, vector: Vector) -> Any:
        @intrinsic  # type: ignore[untyped-decorator]
        def operate(typing_context: Any, a: Any, b: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                method = getattr(builder, name)
                return method(compares, *values) if compares else method(*values)

            return (TRUTHS if compares else vector)(vector, vector), code

        return operate

    known = {
        vector: code_for(name, vector)
        for vector, name in ((FLOATS, of_floats), (WORDS, of_words), (HALVES, of_halves), (TRUTHS, of_truths))
        if name is not None
    }

    @overload(function)
    def operated(a, b):  # type: ignore[no-untyped-def]
        operate = known.get(a) if a == b else None
        return None if operate is None else lambda a, b: operate(a, b)


_register(operator.add, "fadd", "add")
_register(operator.sub, "fsub", "sub")
_register(operator.mul, "fmul", None)
_register(operator.truediv, "fdiv", None)
_register(operator.and_, None, "and_", "and_")
_register(operator.or_, None, "or_")
_register(operator.xor, None, "xor")
_register(operator.lshift, None, "shl")
_register(operator.rshift, None, "lshr")
_register(operator.gt, "fcmp_ordered", "icmp_unsigned", compares=">")
_register(operator.ge, "fcmp_ordered", "icmp_unsigned", compares=">=")
_register(operator.lt, "fcmp_ordered", "icmp_unsigned", of_halves="icmp_unsigned", compares="<")
_register(operator.eq, "fcmp_ordered", "icmp_unsigned", compares="==")
