"""Numbers of 16 bits and fewer in memory, as the float32 numbers that kernels compute with.

Numba has no arrays of float16 and bfloat16 on a CPU.  In kernels they are arrays of their bits, told apart by the sign
of the integer type: int16 for float16, uint16 for bfloat16.  Every operation takes scalars as well as vectors.  So are
quantised rows, see `numba_attn.storage`: int8 for integers of 8 bits, uint8 for those of 4.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from numba_attn import storage
from numba_attn.checks import is_bfloat16
from numba_attn.cpu import fours, target
from numba_attn.cpu.simd import BYTES, I8, I16, I32, PAIRS, Value, Vectors
from numba_attn.storage import GROUP

FLOAT16, BFLOAT16 = types.int16, types.uint16
INT8, INT4 = types.int8, types.uint8
LARGEST = {INT8: storage.LARGEST["int8"], INT4: storage.LARGEST["int4"]}
# Kinds of element, by name: how Numba sees them in memory, and what they are computed in.
STORED = {
    "?": types.boolean, "f": types.float32, "d": types.float64, "float16": FLOAT16, "bfloat16": BFLOAT16,
    "int8": INT8, "int4": INT4,
}  # fmt: skip
COMPUTED = {"f": types.float32, "d": types.float64, "float16": types.float32, "bfloat16": types.float32}


def operand(kind: str, bfloat16_products: bool) -> types.Type:
    """What the products of elements of a kind are made of."""
    return PAIRS if bfloat16_products and target.HAS_BFLOAT16_PAIRS else COMPUTED[kind]


# Kinds of mask, by the number that kernels know them by.
MASKS = ("?", "f", "d", "float16", "bfloat16")


def kind_of(dtype: np.dtype) -> str:
    if is_bfloat16(dtype):
        return "bfloat16"
    return "float16" if dtype.char == "e" else dtype.char


def bits_of(x: np.ndarray) -> np.ndarray:
    """An array as kernels take it."""
    if x.dtype.itemsize != 2:
        return x
    return x.view(np.uint16 if is_bfloat16(x.dtype) else np.int16)


def bytes_of(mask: np.ndarray) -> np.ndarray:
    """A mask as kernels take it: the first byte of every element."""
    return mask.view(_first_of(mask.dtype.itemsize))["first"]


@functools.cache
def _first_of(itemsize: int) -> np.dtype:
    return np.dtype({"names": ["first"], "formats": ["u1"], "itemsize": itemsize})


def load_integers(v: Vectors, row: Value, d: Value, D: Value, count: int, stored: types.Type) -> list[Value]:
    """`count` elements of a quantised row of D from d on, a whole number of so many, as vectors, without its scale."""
    if stored == INT4:
        return fours.load_numbers(v, row, d, D, count)
    b, places = v.builder, (v.add_index(d, first) for first in range(0, count, v.lanes))
    integers = [b.load(v.at(row, at), align=1, typ=ir.VectorType(I8, v.lanes)) for at in places]
    return [b.sitofp(b.sext(x, v.bits), v.type) for x in integers]


def load_scale(v: Vectors, row: Value, D: Value, stored: types.Type) -> Value:
    """Of a quantised row of D elements, of which the integers fill whole groups."""
    if stored == INT4:
        return v.load_scalar(row, fours.bytes_of(v, D))
    return v.load_scalar(row, v.mul_index(v.wholes(D, GROUP), GROUP))


def load(v: Vectors, pointer: Value, offset: int | Value, stored: types.Type, scalar: bool = False) -> Value:
    """A vector of v's type, or one element, from elements of the `stored` type."""
    if BYTES[stored] != 2:
        return v.load_scalar(pointer, offset) if scalar else v.load(pointer, offset)
    kind = I16 if scalar else ir.VectorType(I16, v.lanes)
    return widen(v.builder, v.builder.load(v.at(pointer, offset), align=1, typ=kind), stored)


def store(v: Vectors, value: Value, pointer: Value, offset: int | Value, stored: types.Type) -> None:
    """A vector or an element of v's type, rounded to the nearest of the `stored` type, ties to even."""
    v.store(value if BYTES[stored] != 2 else shorten(v.builder, value, stored), pointer, offset)


def load_words(v: Vectors, row: Value, d: Value, D: Value, count: int, size: int, stored: types.Type) -> list[Value]:
    """`count` elements of 16 bits of a row of D from d on, a whole number of so many, as vectors of `size`.

    They are bfloat16, or integers of fewer bits, which become such.
    """
    if stored == INT4:
        return fours.load_words(v, row, d, D, count, size)
    b, words = v.builder, ir.VectorType(I16, size)
    places = (v.add_index(d, first) for first in range(0, count, size))
    if stored == INT8:
        return [b.sext(b.load(v.at(row, at), align=1, typ=ir.VectorType(I8, size)), words) for at in places]
    return [b.load(v.at(row, v.mul_index(at, 2)), align=1, typ=words) for at in places]


def load_side_by_side(
    v: Vectors, low: Value, high: Value, d: Value, D: Value, count: int, stored: types.Type, in_order: bool = True
) -> list[Value]:
    """Pairs of the elements of two such rows from d on: so many vectors of them, one or an even number.

    Pairs that are not in order take fewer instructions, and what is made of them can be put `in_order` later.
    """
    b, vectors = v.builder, []
    size = v.lanes * min(2, count)
    rows = (load_words(v, row, d, D, count * v.lanes, size, stored) for row in (low, high))
    for x, y in zip(*rows, strict=True):
        order = [*range(size)] if in_order else _order_of_pairs(size)
        for first in range(0, size, v.lanes):
            lanes = [i + side for i in order[first : first + v.lanes] for side in (0, size)]
            vectors.append(b.bitcast(v.shuffle(x, y, lanes), v.bits))
    return vectors


def _order_of_pairs(size: int) -> list[int]:
    """Lower halves of each 128 bits of words, and upper ones, as x86 interleaves them in one instruction."""
    return [first + i for half in (0, 4) for first in range(half, size, 8) for i in range(4)]


def in_order(v: Vectors, vectors: list[Value]) -> list[Value]:
    """Vectors of a lane for each pair of `load_side_by_side`, where these are not in order."""
    found, count = [], min(2, len(vectors))
    order = _order_of_pairs(count * v.lanes)
    for w in range(0, len(vectors), count):
        for first in range(0, count * v.lanes, v.lanes):
            lanes = [order.index(i) for i in range(first, first + v.lanes)]
            found.append(v.shuffle(vectors[w], vectors[w + count - 1], lanes))
    return found


def pair(v: Vectors, low: Value, high: Value) -> Value:
    """Pairs of bfloat16 numbers, see `simd.PAIRS`, of two vectors or two elements."""
    words = _like(low, I32)
    first, second = (v.builder.zext(shorten(v.builder, x, BFLOAT16), words) for x in (low, high))
    return v.builder.or_(first, v.builder.shl(second, _constant(words, 16)))


def load_pair(v: Vectors, row: Value, d: Value, step: Value, D: Value, stored: types.Type) -> Value:
    """The pair of elements d and d + 1 of a row of D; the second is 0 if there is none."""
    exists = v.builder.icmp_signed("<", v.add_index(d, 1), D)
    second = v.add_index(d, v.builder.select(exists, v.index(1), v.index(0)))
    low, high = (load(v, row, v.mul_index(n, step), stored, scalar=True) for n in (d, second))
    return pair(v, low, v.builder.select(exists, high, ir.Constant(high.type, 0.0)))


def _like(x: Value, element: ir.Type) -> ir.Type:
    return ir.VectorType(element, x.type.count) if isinstance(x.type, ir.VectorType) else element


def _constant(kind: ir.Type, value: Any) -> Value:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def widen(b: ir.IRBuilder, bits: Value, stored: types.Type) -> Value:
    """Bits as float32."""
    floats, words = _like(bits, ir.FloatType()), _like(bits, I32)
    if stored == BFLOAT16:
        return b.bitcast(b.shl(b.zext(bits, words), _constant(words, 16)), floats)
    if target.HAS_F16C:
        return b.fpext(b.bitcast(bits, _like(bits, ir.HalfType())), floats)
    # The exponent and the mantissa in their places make a number 2**112 too small, whether normal or not.
    word = b.zext(bits, words)
    size = b.shl(b.and_(word, _constant(words, 0x7FFF)), _constant(words, 13))
    number = b.bitcast(b.fmul(b.bitcast(size, floats), _constant(floats, 2.0**112)), words)
    special = b.icmp_unsigned(">=", size, _constant(words, 0x7C00 << 13))
    number = b.select(special, b.or_(size, _constant(words, 0x7F800000)), number)
    sign = b.shl(b.and_(word, _constant(words, 0x8000)), _constant(words, 16))
    return b.bitcast(b.or_(number, sign), floats)


def shorten(b: ir.IRBuilder, value: Value, stored: types.Type) -> Value:
    """The bits of float32 numbers, rounded."""
    if _like(value, ir.DoubleType()) == value.type:
        value = b.fptrunc(value, _like(value, ir.FloatType()))
    words, bits = _like(value, I32), _like(value, I16)
    if stored == FLOAT16 and target.HAS_F16C:
        return b.bitcast(b.fptrunc(value, _like(value, ir.HalfType())), bits)
    word = b.bitcast(value, words)
    size = b.and_(word, _constant(words, 0x7FFFFFFF))
    nan = b.icmp_unsigned(">", size, _constant(words, 0x7F800000))
    if stored == BFLOAT16:
        odd = b.and_(b.lshr(word, _constant(words, 16)), _constant(words, 1))
        rounded = b.add(word, b.add(odd, _constant(words, 0x7FFF)))
        quiet = b.or_(word, _constant(words, 0x400000))
        return b.trunc(b.lshr(b.select(nan, quiet, rounded), _constant(words, 16)), bits)
    # Normal numbers: round the mantissa, which may carry into the exponent, up to infinity.
    odd = b.and_(b.lshr(size, _constant(words, 13)), _constant(words, 1))
    rounded = b.add(size, b.add(odd, _constant(words, 0xFFF - (112 << 23) & 0xFFFFFFFF)))
    normal = b.lshr(rounded, _constant(words, 13))
    # Below 2**-14, adding 1/2 leaves the rounded mantissa in the lowest bits.
    half = _constant(_like(value, ir.FloatType()), 0.5)
    sum_ = b.fadd(b.bitcast(size, half.type), half)
    tiny = b.sub(b.bitcast(sum_, words), b.bitcast(half, words))
    number = b.select(b.icmp_unsigned("<", size, _constant(words, 113 << 23)), tiny, normal)
    number = b.select(b.icmp_unsigned(">=", size, _constant(words, 0x47800000)), _constant(words, 0x7C00), number)
    number = b.select(nan, _constant(words, 0x7E00), number)
    return b.trunc(b.or_(number, b.and_(b.lshr(word, _constant(words, 16)), _constant(words, 0x8000))), bits)
