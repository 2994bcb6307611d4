"""Rows of an array into working memory, transposed or not; results out of it: all that knows how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from numba_attn.cpu import narrow
from numba_attn.cpu.blocks import LINE, Lanes
from numba_attn.cpu.emits import emits
from numba_attn.cpu.simd import BYTES, I32, PAIRS, WORDS, Value, Vectors
from numba_attn.cpu.softmax import share
from numba_attn.cpu.target import MANY_REGISTERS

ROWS_AHEAD = 8  # how far rows to be copied are asked for: they may be anywhere


def _whole_vectors(v: Vectors, step: Value, size: int, count: Value) -> Value:
    """How many of `count` elements of `size` bytes, `step` bytes apart, can be moved as whole vectors."""
    contiguous = v.builder.icmp_signed("==", step, v.index(size))
    return v.builder.select(contiguous, v.whole_steps(v.index(0), count, v.lanes), v.index(0))


def _transpose(v, width, q, q_head, q_row, q_step, rows, count, D, qt):
    """qt (D, width x lanes) = q.T, or pairs of it along D; the last row again in lanes beyond `count`.

    These are the `rows` rows of each of some heads, one head after the other, `q_head` bytes apart.
    """
    lanes = Lanes.of(v, rows, count, q_row, q_head)
    _transpose_lanes(v, width, partial(lanes.place, q), q_row, q_step, D, qt, MANY_REGISTERS)


def _transpose_tile(v, width, q, q_row, q_step, rows, D, qt):
    """The same of any number of rows of one head; those of the next vector are asked for while one is made."""
    last = v.add_index(rows, -1)
    _transpose_lanes(v, width, lambda i: v.at(q, v.mul_index(q_row, v.least(i, last))), q_row, q_step, D, qt, True)


def _transpose_lanes(
    v: Vectors, width: Value, place: Callable[[Value], Value], q_row: Value, q_step: Value, D: Value, qt: Value,
    asking: bool,
) -> None:  # fmt: skip
    """Of rows that are at a `place` for each lane."""
    stored, kept = v.pointees["q"], v.pointees["qt"]
    pairs, kept_size = kept == PAIRS, BYTES[kept]
    row = v.mul_index(width, v.lanes * kept_size)
    size = BYTES[stored]
    whole = _whole_vectors(v, q_step, size, D)

    def squares(w: Value) -> None:
        lanes = [place(v.add_index(v.mul_index(w, v.lanes), i)) for i in range(v.lanes)]

        def ask(d: Value) -> None:
            for lane in lanes if asking else []:
                v.prefetch(v.at(lane, v.mul_index(q_row, v.lanes)), v.mul_index(d, size))

        def square_of_pairs(d: Value, _: list[Value]) -> list[Value]:
            ask(d)
            columns = v.transpose([v.load(lane, v.mul_index(d, size)) for lane in lanes])
            to = v.at(v.at(qt, v.mul_index(v.half(d), row)), v.mul_index(w, v.lanes * kept_size))
            for r, column in enumerate(columns):
                v.store(column, v.at(to, v.mul_index(row, r)))
            return []

        def square(d: Value, _: list[Value]) -> list[Value]:
            ask(d)
            columns = v.transpose([narrow.load(v, lane, v.mul_index(d, size), stored) for lane in lanes])
            at = v.mul_index(w, v.lanes * kept_size)
            if pairs:
                for r, (low, high) in enumerate(zip(columns[::2], columns[1::2], strict=True)):
                    v.store(narrow.pair(v, low, high), v.at(qt, v.mul_index(v.add_index(v.half(d), r), row)), at)
                return []
            for r, column in enumerate(columns):
                narrow.store(v, column, v.at(qt, v.mul_index(v.add_index(d, r), row)), at, kept)
            return []

        start = v.index(0)
        if pairs and stored == narrow.BFLOAT16:  # pairs in memory already
            start = v.whole_steps(start, whole, 2 * v.lanes)
            v.loop(0, start, 2 * v.lanes, [], square_of_pairs)
        v.loop(start, whole, v.lanes, [], square)

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            source = place(i)
            if pairs:
                x = narrow.load_pair(v, source, d, q_step, D, stored)
                v.store(x, v.at(qt, v.mul_index(v.half(d), row)), v.mul_index(i, v.size))
                return
            x = narrow.load(v, source, v.mul_index(d, q_step), stored, scalar=True)
            narrow.store(v, x, v.at(qt, v.mul_index(d, row)), v.mul_index(i, kept_size), kept)

        v.each(v.mul_index(width, v.lanes), lane)
        return []

    v.each(width, squares)
    v.loop(whole, D, 2 if pairs else 1, [], line)


def _copy_rows(v, k, k_row, k_step, rows, D, columns, out):
    """out (rows, columns), contiguous, = k (rows, D) and zeros, in the type of out, or bfloat16 for pairs.

    For words they are numbers, that are to be rounded.
    """
    _copy_page(v, k, v.at(k, v.mul_index(k_row, ROWS_AHEAD)), k_row, k_step, rows, D, columns, out)


def _copy_page(v, k, ahead, k_row, k_step, rows, D, columns, out):
    """The same, but rows that are to be asked for begin `ahead`."""
    stored = v.pointees["k"]
    if BYTES[stored] == 1:
        _dequantise_rows(v, stored, k, k_row, rows, D, columns, out)
        return
    kept = {PAIRS: narrow.BFLOAT16, WORDS: v.dtype}.get(v.pointees["out"], v.pointees["out"])
    size, kept_size = BYTES[stored], BYTES[kept]
    whole = _whole_vectors(v, k_step, size, D)

    def row(i: Value) -> None:
        source = v.at(k, v.mul_index(i, k_row))
        to = v.at(out, v.mul_index(v.mul_index(i, columns), kept_size))
        later = v.at(ahead, v.mul_index(i, k_row))
        v.each(v.wholes(v.mul_index(D, size), LINE), lambda line: v.prefetch(later, v.mul_index(line, LINE)))

        def move(d: Value, _: list[Value], scalar: bool) -> list[Value]:
            x = narrow.load(v, source, v.mul_index(d, k_step if scalar else size), stored, scalar)
            narrow.store(v, x, to, v.mul_index(d, kept_size), kept)
            return []

        def zero(d: Value, _: list[Value]) -> list[Value]:
            narrow.store(v, ir.Constant(v.element, 0.0), to, v.mul_index(d, kept_size), kept)
            return []

        v.loop(0, whole, v.lanes, [], partial(move, scalar=False))
        v.loop(whole, D, 1, [], partial(move, scalar=True))
        v.loop(D, columns, 1, [], zero)

    v.each(rows, row)


def _dequantise_rows(
    v: Vectors, stored: Any, k: Value, k_row: Value, rows: Value, D: Value, columns: Value, out: Value
) -> None:
    """out (rows, columns), contiguous numbers, = k (rows, D); what is left of a last vector is not written."""
    whole = v.whole_steps(v.index(0), D, v.lanes)

    def row(i: Value) -> None:
        source = v.at(k, v.mul_index(i, k_row))
        to = v.at(out, v.mul_index(v.mul_index(i, columns), v.size))

        scale = v.splat(narrow.load_scale(v, source, D, stored))

        def numbers(d: Value) -> Value:
            (integers,) = narrow.load_integers(v, source, d, D, v.lanes, stored)
            return v.mul(integers, scale)

        def vector(d: Value, _: list[Value]) -> list[Value]:
            v.store(numbers(d), to, v.mul_index(d, v.size))
            return []

        v.loop(0, whole, v.lanes, [], vector)
        with v.builder.if_then(v.builder.icmp_signed("<", whole, D)):
            rest = numbers(whole)
            for lane in range(v.lanes - 1):
                d = v.add_index(whole, lane)
                with v.builder.if_then(v.builder.icmp_signed("<", d, D)):
                    x = v.builder.extract_element(rest, ir.Constant(I32, lane))
                    narrow.store(v, x, to, v.mul_index(d, v.size), v.dtype)

    v.each(rows, row)


def _pair_rows(v, value, value_row, value_step, rows, Dv, out):
    """out (half of the rows, Dv) = pairs of rows; a last one with zeros."""
    stored = v.pointees["value"]
    size = BYTES[stored]
    whole = _whole_vectors(v, value_step, size, Dv)

    def pair(j: Value) -> None:
        first = v.at(value, v.mul_index(v.mul_index(j, 2), value_row))
        to = v.at(out, v.mul_index(v.mul_index(j, Dv), v.size))
        exists = v.builder.icmp_signed("<", v.add_index(v.mul_index(j, 2), 1), rows)
        # Where there is no second row, the first one is read again, and not used.
        second = v.at(first, v.builder.select(exists, value_row, v.index(0)))

        def columns(d: Value, _: list[Value], scalar: bool) -> list[Value]:
            at = v.mul_index(d, value_step)
            low, high = (narrow.load(v, source, at, stored, scalar) for source in (first, second))
            high = v.builder.select(exists, high, ir.Constant(high.type, None))
            v.store(narrow.pair(v, low, high), to, v.mul_index(d, v.size))
            return []

        def vector_of_pairs(d: Value, _: list[Value]) -> list[Value]:
            (x,) = narrow.load_side_by_side(v, first, second, d, Dv, 1, stored)
            v.store(v.builder.and_(x, kept), to, v.mul_index(d, v.size))
            return []

        if stored == narrow.BFLOAT16:
            kept = v.splat(v.builder.select(exists, I32(0xFFFFFFFF), I32(0xFFFF)))
            v.loop(0, whole, v.lanes, [], vector_of_pairs)
        else:
            v.loop(0, whole, v.lanes, [], partial(columns, scalar=False))
        v.loop(whole, Dv, 1, [], partial(columns, scalar=True))

    v.each(v.half(rows), pair)


def _write_rows(v, width, ot, Dv, total, gain, factors, out, out_head, out_row, out_step, rows, count):
    """out = ot.T * gain / total, 0 for a query that attends to nothing; the factors are left in memory.

    The first `count` lanes are the `rows` rows of each of some heads, as in `_transpose`.  Returns whether some result
    is not finite.
    """
    row, stored = v.mul_index(width, v.bytes), v.pointees["out"]
    size = BYTES[stored]
    whole = _whole_vectors(v, out_step, size, Dv)
    zero, lanes = v.constant(0.0), Lanes.of(v, rows, count, out_row, out_head)

    def squares(w: Value, check: list[Value]) -> list[Value]:
        first, here = v.mul_index(w, v.lanes), v.mul_index(w, v.bytes)
        sums = v.load(total, here)
        factor = share(v, sums, gain)
        v.store(factor, factors, here)

        def results(d: Value, check: list[Value], count: int) -> tuple[list[Value], list[Value]]:
            at = v.at(v.at(ot, v.mul_index(d, row)), here)
            lines = [v.mul(v.load(at, v.mul_index(row, r)), factor) for r in range(count)]
            for line in lines:
                check = [v.fma(line, zero, check[0])]
            return lines, check

        def square(d: Value, check: list[Value]) -> list[Value]:
            lines, check = results(d, check, v.lanes)
            for i, line in enumerate(v.transpose(lines)):
                lane = v.add_index(first, i)
                with v.builder.if_then(v.builder.icmp_signed("<", lane, count)):
                    narrow.store(v, line, lanes.place(out, lane), v.mul_index(d, size), stored)
            return check

        check = v.loop(0, whole, v.lanes, [v.fma(sums, zero, check[0])], square)
        return v.loop(whole, Dv, 1, check, lambda d, check: results(d, check, 1)[1])

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            at = v.mul_index(i, v.size)
            x = v.builder.fmul(v.load_scalar(v.at(ot, v.mul_index(d, row)), at), v.load_scalar(factors, at))
            narrow.store(v, x, lanes.place(out, i), v.mul_index(d, out_step), stored)

        v.each(count, lane)
        return []

    (check,) = v.loop(0, width, 1, [zero], squares)
    v.loop(whole, Dv, 1, [], line)
    return v.any(v.builder.fcmp_unordered("uno", check, check))


def _write_row(v, row, Dv, out, out_step):
    """out = row (Dv), contiguous, at any stride."""
    stored = v.pointees["out"]
    size = BYTES[stored]
    whole = _whole_vectors(v, out_step, size, Dv)

    def move(d: Value, _: list[Value], scalar: bool) -> list[Value]:
        x = (v.load_scalar if scalar else v.load)(row, v.mul_index(d, v.size))
        narrow.store(v, x, out, v.mul_index(d, out_step if scalar else size), stored)
        return []

    v.loop(0, whole, v.lanes, [], partial(move, scalar=False))
    v.loop(whole, Dv, 1, [], partial(move, scalar=True))


def _fill_lanes(v, memory, value, vectors):
    """`vectors` vectors of working memory = value."""
    x = v.splat(value)
    v.each(vectors, lambda i: v.store(x, memory, v.mul_index(i, v.bytes)))


def _fill(v, array, row, step, rows, columns, value):
    """array (rows, columns) = value, at any strides."""

    def line(i: Value) -> None:
        at = v.at(array, v.mul_index(i, row))
        v.each(columns, lambda j: narrow.store(v, value, at, v.mul_index(j, step), v.pointees["array"]))

    v.each(rows, line)


def _ask_for(v, x, row, rows, length):
    """Prefetch rows of so many bytes, `row` bytes apart."""

    def lines(i: Value) -> None:
        at = v.at(x, v.mul_index(i, row))
        v.each(v.wholes(length, LINE), lambda line: v.prefetch(at, v.mul_index(line, LINE)))

    v.each(rows, lines)


# For a few rows, of queries, asking takes longer than it saves where addresses of so many fit no registers.
transpose = emits(_transpose)
transpose_tile = emits(_transpose_tile)
copy_rows = emits(_copy_rows)
copy_page = emits(_copy_page)
pair_rows = emits(_pair_rows)
write_rows = emits(_write_rows, returns=types.boolean)
write_row = emits(_write_row)
ask_for = emits(_ask_for)
fill = emits(_fill)
fill_lanes = emits(_fill_lanes)
