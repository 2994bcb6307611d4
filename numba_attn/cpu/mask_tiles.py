"""Masks, as tiles of numbers that are added to base-2 scores: 0 where a query may attend to a key, -inf where not.

A tile is bias (n, block), keys down, queries across, as the scores are: of whole vectors, or with few queries of less
than one, so that vectors have several keys.  Masks are read in place, with any strides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir
from numba import types

from numba_attn.block_mask import EMPTY, FULL, PARTIAL
from numba_attn.cpu import narrow
from numba_attn.cpu.blocks import INFINITY, LOG2_E, Keys, Lanes, for_keys, for_vectors
from numba_attn.cpu.emits import emits
from numba_attn.cpu.simd import BYTES, ELEMENTS, I8, I64, Value, Vectors

# Keys by which a tile is shortened at either end, as long as a mask excludes them.
TRIM = 16


def _for_kind(kind: Value, build: Callable[[types.Type], None], v: Vectors) -> None:
    """`build(type of a mask's elements)` for the one that a mask has at run time, a number in narrow.MASKS."""
    v.choose(kind, {n: partial(build, narrow.STORED[name]) for n, name in enumerate(narrow.MASKS)})


def _stored(stored: types.Type) -> tuple[ir.Type, int]:
    """An element of a mask as LLVM sees it, and its bytes."""
    return ELEMENTS.get(stored, ir.IntType(8 * BYTES[stored])), BYTES[stored]


def _as_bias(v: Vectors, x: Value, stored: types.Type) -> Value:
    """A loaded mask value, or a vector of them, as what is added to base-2 scores: True is 0, False -inf."""
    b = v.builder
    if BYTES[stored] == 2:
        x = narrow.widen(b, x, stored)
    vector = isinstance(x.type, ir.VectorType)
    kind, element = (v.type, x.type.element) if vector else (v.element, x.type)

    def constant(value: float, like: ir.Type = kind) -> Value:
        return ir.Constant(like, [value] * v.lanes if vector else value)

    if element == I8:
        return b.select(b.icmp_unsigned("!=", x, constant(0, x.type)), constant(0.0), constant(-INFINITY))
    if x.type != kind:
        x = b.fptrunc(x, kind) if v.size == 4 else b.fpext(x, kind)
    # The largest finite numbers stay finite: they are a penalty, only -inf is a mask.
    scaled, floor = b.fmul(x, constant(v.rounded(LOG2_E))), constant(-v.largest)
    scaled = b.select(b.fcmp_ordered("<", scaled, floor), floor, scaled)
    return b.select(b.fcmp_ordered("==", x, constant(-INFINITY)), x, scaled)


def _mask_rows(v, width, bias, mask, kind, mask_row, mask_head, rows, count, n):
    """bias (n, block) from a mask whose keys are contiguous, transposed in registers; n a multiple of the lanes.

    The `count` rows in the block are `rows` of each of some heads, whose masks are `mask_head` bytes apart.
    """
    row, lanes = v.mul_index(width, v.bytes), Lanes.of(v, rows, count, mask_row, mask_head)

    def of_kind(stored: types.Type) -> None:
        element, size = _stored(stored)

        def vector(w: Value, here: Value) -> None:
            places = lanes.places(mask, w)

            def keys(j: Value, _: list[Value]) -> list[Value]:
                at = v.mul_index(j, size)
                for place in places:
                    v.prefetch(place, v.add_index(at, v.mul_index(n, size)))
                loaded = [
                    v.builder.load(v.at(place, at), align=1, typ=ir.VectorType(element, v.lanes)) for place in places
                ]
                for r, column in enumerate(v.transpose([_as_bias(v, x, stored) for x in loaded])):
                    v.store(column, v.at(bias, v.mul_index(v.add_index(j, r), row)), here)
                return []

            v.loop(0, n, v.lanes, [], keys)

        v.each(width, lambda w: vector(w, v.mul_index(w, v.bytes)))

    _for_kind(kind, of_kind, v)


def _mask_keys(v, width, bias, mask, kind, mask_step, n):
    """bias (n, block) from a mask that is the same for every query."""
    row = v.mul_index(width, v.bytes)

    def of_kind(stored: types.Type) -> None:
        def key(j: Value) -> None:
            x = v.builder.load(v.at(mask, v.mul_index(j, mask_step)), align=1, typ=_stored(stored)[0])
            x = v.splat(_as_bias(v, x, stored))
            for_vectors(v, width, lambda here: v.store(x, v.at(bias, v.mul_index(j, row)), here))

        v.each(n, key)

    _for_kind(kind, of_kind, v)


def _mask_elements(v, width, bias, mask, kind, mask_row, mask_head, mask_step, rows, count, first, n):
    """The same, keys from `first` on, from a mask of any strides, element by element."""
    row, lanes = v.mul_index(width, v.bytes), Lanes.of(v, rows, count, mask_row, mask_head)

    def of_kind(stored: types.Type) -> None:
        def key(j: Value, _: list[Value]) -> list[Value]:
            def lane(i: Value) -> None:
                at = v.at(lanes.place(mask, i), v.mul_index(j, mask_step))
                x = _as_bias(v, v.builder.load(at, align=1, typ=_stored(stored)[0]), stored)
                v.store(x, v.at(bias, v.mul_index(j, row)), v.mul_index(i, v.size))

            v.each(v.mul_index(width, v.lanes), lane)
            return []

        v.loop(first, n, 1, [], key)

    _for_kind(kind, of_kind, v)


def _mask_line(v, bias, mask, kind, mask_step, n, end):
    """bias (end,) from a mask of n keys, the last of them again behind it."""

    def of_kind(stored: types.Type) -> None:
        element, size = _stored(stored)
        beside = v.builder.icmp_signed("==", mask_step, v.index(size))
        whole = v.builder.select(beside, v.whole_steps(v.index(0), n, v.lanes), v.index(0))

        def keys(j: Value, _: list[Value]) -> list[Value]:
            x = v.builder.load(v.at(mask, v.mul_index(j, size)), align=1, typ=ir.VectorType(element, v.lanes))
            v.store(_as_bias(v, x, stored), bias, v.mul_index(j, v.size))
            return []

        def key(j: Value, _: list[Value]) -> list[Value]:
            at = v.at(mask, v.mul_index(v.least(j, v.add_index(n, -1)), mask_step))
            v.store(_as_bias(v, v.builder.load(at, align=1, typ=element), stored), bias, v.mul_index(j, v.size))
            return []

        v.loop(0, whole, v.lanes, [], keys)
        v.loop(whole, end, 1, [], key)

    _for_kind(kind, of_kind, v)


def _repeat(v, bias, n, stride):
    """bias (n, stride) = bias (n,), in place, of so many keys that these are whole vectors."""

    def each(stride: int) -> None:
        keys = v.lanes // stride
        vectors = v.builder.udiv(n, v.index(keys))

        def vector(i: Value) -> None:
            w = v.builder.sub(v.add_index(vectors, -1), i)  # from the last one: none is overwritten that is to be read
            x = v.load(bias, v.mul_index(w, keys * v.size))
            v.store(v.shuffle(x, x, [lane // stride for lane in range(v.lanes)]), bias, v.mul_index(w, v.bytes))

        v.each(vectors, vector)

    strides = [1 << i for i in range(1, v.lanes.bit_length() - 1)]
    v.choose(stride, {1: lambda: None, **{some: partial(each, some) for some in strides}})


def _gather(v, bias, n, stride):
    """bias (n, stride) = the first of each vector of bias (n, 1 vector), in place."""

    def key(j: Value, _: list[Value]) -> list[Value]:
        v.store(v.load(bias, v.mul_index(j, v.bytes)), bias, v.mul_index(j, v.mul_index(stride, v.size)))
        return []

    v.loop(0, n, 1, [], key)


def _mask_outside(v, width, bias, source, source_row, n, stride, low, high, every_low, every_high):
    """bias = source (`source_row` bytes from a key's vectors on), but -inf where the key is not in [low, high).

    Keys, of which each has `stride` elements, count from the first of the tile; low and high hold a whole number a
    query.  Keys in [every_low, every_high) are in every query's.  Behind the last key all is -inf.
    """
    row, keys = v.mul_index(width, v.bytes), Keys.of(v, stride)
    lowest, nothing, end = v.constant(-INFINITY), v.index(0), keys.vectors(n)
    inner = v.least(keys.vectors(v.most(nothing, every_low)), end)
    outer = v.most(inner, v.builder.udiv(v.most(nothing, v.least(every_high, n)), keys.count))

    def vector(here: Value) -> None:
        first, last = v.load(low, here), v.load(high, here)

        def masked(j: Value, number: list[Value]) -> list[Value]:
            x, key = v.load(v.at(source, v.mul_index(j, source_row)), here), number[0]
            inside = v.builder.and_(v.builder.not_(v.less(key, first)), v.less(key, last))
            v.store(v.select(inside, x, lowest), v.at(bias, v.mul_index(j, row)), here)
            return [v.add(key, keys.step())]

        def copied(j: Value, _: list[Value]) -> list[Value]:
            v.store(v.load(v.at(source, v.mul_index(j, source_row)), here), v.at(bias, v.mul_index(j, row)), here)
            return []

        start = v.splat(v.builder.sitofp(v.mul_index(outer, keys.count), v.element))
        v.loop(0, inner, 1, [keys.numbers()], masked)
        v.loop(inner, outer, 1, [], copied)
        v.loop(outer, end, 1, [v.add(start, keys.numbers())], masked)

    for_vectors(v, width, vector)


def _add_alibi(v, width, bias, source, source_row, n, slopes, rows, count, stride, first):
    """bias = source (`source_row` bytes from a key's vectors on) - slope * |distance|.

    The `count` rows in the block are `rows` of each of some heads, of which each has one of the slopes; the first row
    of each is `first` keys after key 0, of n, of which each has `stride` elements.
    """
    row, of_vector = v.mul_index(width, v.bytes), Keys.of(v, stride)
    lanes = Lanes.of(v, rows, count, v.index(0), v.index(v.size), of_vector)

    def vector(w: Value) -> None:
        here = v.mul_index(w, v.bytes)
        minus = v.sub(v.constant(0.0), v.beside([v.load_scalar(place) for place in lanes.places(slopes, w)]))
        numbers = [v.builder.sitofp(v.add_index(first, i), v.element) for i in lanes.rows_of_heads(w)]

        def keys(j: Value, height: int, distance: list[Value]) -> list[Value]:
            for r in range(height):
                size = v.absolute(v.sub(distance[0], v.mul(of_vector.step(), v.constant(float(r)))))
                x = v.load(v.at(source, v.mul_index(v.add_index(j, r), source_row)), here)
                v.store(v.fma(size, minus, x), v.at(bias, v.mul_index(v.add_index(j, r), row)), here)
            return [v.sub(distance[0], v.mul(of_vector.step(), v.constant(float(height))))]

        for_keys(v, of_vector.vectors(n), [v.sub(v.beside(numbers), of_vector.numbers())], keys)

    v.each(width, vector)


def _classify(v, width, bias, n):
    """EMPTY if the bias (n, block) masks everything, FULL if it does nothing, PARTIAL otherwise."""
    b = v.builder
    zero, lowest = v.constant(0.0), v.constant(-INFINITY)

    def vector(here: Value, found: list[Value]) -> list[Value]:
        x = v.load(bias, here)
        return [b.or_(found[0], b.fcmp_unordered("!=", x, lowest)), b.or_(found[1], b.fcmp_unordered("!=", x, zero))]

    nothing = b.fcmp_ordered("!=", zero, zero)
    end = v.mul_index(v.mul_index(width, v.bytes), n)
    kept, changed = v.loop(0, end, v.bytes, [nothing, nothing], vector)
    full = b.select(v.any(changed), v.index(PARTIAL), v.index(FULL))
    return b.select(v.any(kept), full, v.index(EMPTY))


def _count_true(v, mask, n):
    """How many of n contiguous booleans are True, for the quickest answer to "all?" and "none?"."""
    b = v.builder

    def chunks(width: int, first: Value, count: Value) -> tuple[Value, Value]:
        """Go on counting from `first`, `width` at once; where that ended, and the count."""
        vector, bits = ir.VectorType(I8, width), ir.IntType(width)

        def chunk(j: Value, count: list[Value]) -> list[Value]:
            x = b.load(v.at(mask, j), align=1, typ=vector)
            true = b.ctpop(b.bitcast(b.icmp_unsigned("!=", x, ir.Constant(vector, None)), bits))
            return [b.add(count[0], true if width == 64 else b.zext(true, I64))]

        end = v.whole_steps(first, n, width)
        return end, v.loop(first, end, width, [count], chunk)[0]

    end, count = chunks(v.bytes, v.index(0), v.index(0))
    if v.bytes > 16:
        end, count = chunks(16, end, count)
    return chunks(1, end, count)[1]


def _any_true(v, mask, mask_row, rows):
    """Whether any of TRIM contiguous booleans in any of the rows is True."""
    b, kind = v.builder, ir.VectorType(I8, TRIM)

    def row(i: Value, seen: list[Value]) -> list[Value]:
        return [b.or_(seen[0], b.load(v.at(mask, v.mul_index(mask_row, i)), align=1, typ=kind))]

    (seen,) = v.loop(0, rows, 1, [ir.Constant(kind, None)], row)
    bits = b.bitcast(seen, ir.IntType(8 * TRIM))
    return b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


mask_rows = emits(_mask_rows)
mask_keys = emits(_mask_keys)
mask_elements = emits(_mask_elements)
mask_line = emits(_mask_line)
repeat = emits(_repeat)
gather = emits(_gather)
mask_outside = emits(_mask_outside)
add_alibi = emits(_add_alibi)
classify = emits(_classify, returns=types.int64)
count_true = emits(_count_true, returns=types.int64)
any_true = emits(_any_true, returns=types.boolean)
