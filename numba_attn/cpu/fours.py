"""Elements of rows of 4 bits, see `numba_attn.storage`, as words of 16 bits or as numbers, without the row's scale.

An element is n times a factor of its block, 2 c, and a summand of it, c (k - 18).  As every eighth element is of the
same block, a vector of factors, and one of summands, is all that 64 elements need.
"""

from __future__ import annotations

from llvmlite import ir

from numba_attn.cpu.simd import I8, I16, Value, Vectors
from numba_attn.storage import BLOCKS, GROUP, MIDDLE, SHIFTS, TOGETHER

HALF = GROUP // 2  # elements whose n are in the same half of their bytes


def load_words(v: Vectors, row: Value, d: Value, D: Value, count: int, size: int) -> list[Value]:
    """`count` elements of a row of D from d on, a power of two, of which d is a multiple: vectors of `size` words."""
    b, kind, found = v.builder, ir.VectorType(I16, size), []
    for first, end in _alike(count, size):
        factors, summands = _meaning(v, row, v.add_index(d, first), D, kind)
        for at in range(first, end, size):
            found.append(b.add(b.mul(_load_n(v, row, d, at, count, kind), factors), summands))
    return found


def load_numbers(v: Vectors, row: Value, d: Value, D: Value, count: int) -> list[Value]:
    """`count` elements of a row of D from d on, a power of two, of which d is a multiple, as vectors of numbers."""
    b, found = v.builder, []
    for first, end in _alike(count, v.lanes):
        factors, summands = (b.sitofp(x, v.type) for x in _meaning(v, row, v.add_index(d, first), D, v.bits))
        for at in range(first, end, v.lanes):
            n = b.sitofp(_load_n(v, row, d, at, count, v.bits), v.type)
            found.append(v.fma(n, factors, summands))
    return found


def bytes_of(v: Vectors, D: Value) -> Value:
    """Of a row's integers, behind which its scale is."""
    return v.add_index(v.mul_index(v.wholes(D, GROUP), HALF), v.mul_index(v.wholes(D, TOGETHER), BLOCKS))


def _alike(count: int, size: int) -> list[tuple[int, int]]:
    """Ranges of `count` elements, in which each vector of a size has the same blocks in its lanes."""
    step = min(count, TOGETHER if size >= BLOCKS else size)
    return [(first, first + step) for first in range(0, count, step)]


def _meaning(v: Vectors, row: Value, d: Value, D: Value, kind: ir.VectorType) -> tuple[Value, Value]:
    """The factor and the summand of the block of each element of a vector from d on."""
    b, blocks = v.builder, min(BLOCKS, kind.count)
    place = v.mul_index(b.lshr(d, v.index(TOGETHER.bit_length() - 1)), BLOCKS)
    if blocks < BLOCKS:
        place = v.add_index(place, b.and_(d, v.index(BLOCKS - 1)))
    at = v.at(row, v.add_index(v.mul_index(v.wholes(D, GROUP), HALF), place))
    few = ir.VectorType(kind.element, blocks)
    codes = b.zext(b.load(at, align=1, typ=ir.VectorType(I8, blocks)), few)
    three, lower, middle = (ir.Constant(few, [x] * blocks) for x in (SHIFTS.bit_length() - 1, SHIFTS - 1, MIDDLE))
    c = b.lshr(codes, three)
    meaning = b.add(c, c), b.mul(c, b.sub(b.and_(codes, lower), middle))
    factors, summands = (v.shuffle(x, x, [i % blocks for i in range(kind.count)]) for x in meaning)
    return factors, summands


def _load_n(v: Vectors, row: Value, d: Value, at: int, count: int, kind: ir.VectorType) -> Value:
    """The n of a vector of elements, `at` behind d, of which `count` are loaded, as integers."""
    b, size = v.builder, kind.count
    group = v.at(row, v.mul_index(b.lshr(d, v.index(GROUP.bit_length() - 1)), HALF))
    lower = ir.Constant(kind, [HALF - 1] * size)

    def load(place: int | Value, elements: int) -> Value:
        return b.load(v.at(group, place), align=1, typ=ir.VectorType(I8, elements))

    if count < GROUP:  # in one half of a group, or another
        inside = v.add_index(b.and_(d, v.index(GROUP - 1)), at)
        shift = v.splat(b.trunc(b.and_(b.lshr(inside, v.index(2)), v.index(4)), kind.element), size)
        return b.and_(b.lshr(b.zext(load(b.and_(inside, v.index(HALF - 1)), size), kind), shift), lower)
    start, inside = at // GROUP * HALF, at % GROUP
    if size == GROUP:
        both = load(start, HALF)
        both = b.zext(v.shuffle(both, both, [*range(HALF)] * 2), kind)
        return b.and_(b.lshr(both, ir.Constant(kind, [0] * HALF + [4] * HALF)), lower)
    n = b.zext(load(start + inside % HALF, size), kind)
    return b.and_(n, lower) if inside < HALF else b.lshr(n, ir.Constant(kind, [4] * size))
