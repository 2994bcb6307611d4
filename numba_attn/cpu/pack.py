"""Rows of an array into working memory, transposed or not; results out of it: all that knows how they are stored."""

from __future__ import annotations

from numba_attn.cpu import narrow
from numba_attn.cpu.simd import BYTES, Value, Vectors, emits
from numba_attn.cpu.tiles import lane_rows


def _whole_vectors(v: Vectors, step: Value, size: int, count: Value) -> Value:
    """How many of `count` elements of `size` bytes, `step` bytes apart, can be moved as whole vectors."""
    contiguous = v.builder.icmp_signed("==", step, v.index(size))
    return v.builder.select(contiguous, v.whole_steps(v.index(0), count, v.lanes), v.index(0))


def _transpose(v, width, q, q_row, q_step, rows, D, qt):
    """qt (D, width vectors) = q.T; the last row again in lanes beyond `rows`."""
    row, stored = v.mul_index(width, v.bytes), v.pointees["q"]
    size = BYTES[stored]
    whole = _whole_vectors(v, q_step, size, D)

    def squares(w: Value) -> None:
        lanes = [v.at(q, v.mul_index(q_row, i)) for i in lane_rows(v, w, rows)]

        def square(d: Value, _: list[Value]) -> list[Value]:
            columns = v.transpose([narrow.load(v, lane, v.mul_index(d, size), stored) for lane in lanes])
            for r, column in enumerate(columns):
                v.store(column, v.at(qt, v.mul_index(v.add_index(d, r), row)), v.mul_index(w, v.bytes))
            return []

        v.loop(0, whole, v.lanes, [], square)

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            source = v.at(q, v.mul_index(q_row, v.least(i, v.add_index(rows, -1))))
            x = narrow.load(v, source, v.mul_index(d, q_step), stored, scalar=True)
            v.store(x, v.at(qt, v.mul_index(d, row)), v.mul_index(i, v.size))

        v.each(v.mul_index(width, v.lanes), lane)
        return []

    v.each(width, squares)
    v.loop(whole, D, 1, [], line)


def _widen_rows(v, k, k_row, k_step, rows, D, out):
    """out (rows, D), contiguous, = k."""
    stored = v.pointees["k"]
    size = BYTES[stored]
    whole = _whole_vectors(v, k_step, size, D)

    def row(i: Value) -> None:
        source, to = v.at(k, v.mul_index(i, k_row)), v.at(out, v.mul_index(v.mul_index(i, D), v.size))

        def vector(d: Value, _: list[Value]) -> list[Value]:
            v.store(narrow.load(v, source, v.mul_index(d, size), stored), to, v.mul_index(d, v.size))
            return []

        def one(d: Value, _: list[Value]) -> list[Value]:
            v.store(narrow.load(v, source, v.mul_index(d, k_step), stored, scalar=True), to, v.mul_index(d, v.size))
            return []

        v.loop(0, whole, v.lanes, [], vector)
        v.loop(whole, D, 1, [], one)

    v.each(rows, row)


def _write_rows(v, width, ot, Dv, out, out_row, out_step, rows):
    """out (rows, Dv) = ot.T."""
    row, stored = v.mul_index(width, v.bytes), v.pointees["out"]
    size = BYTES[stored]
    whole = _whole_vectors(v, out_step, size, Dv)

    def squares(w: Value) -> None:
        first = v.mul_index(w, v.lanes)

        def square(d: Value, _: list[Value]) -> list[Value]:
            at = v.at(v.at(ot, v.mul_index(d, row)), v.mul_index(w, v.bytes))
            for i, line in enumerate(v.transpose([v.load(at, v.mul_index(row, r)) for r in range(v.lanes)])):
                lane = v.add_index(first, i)
                with v.builder.if_then(v.builder.icmp_signed("<", lane, rows)):
                    narrow.store(v, line, v.at(out, v.mul_index(out_row, lane)), v.mul_index(d, size), stored)
            return []

        v.loop(0, whole, v.lanes, [], square)

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            x = v.load_scalar(v.at(ot, v.mul_index(d, row)), v.mul_index(i, v.size))
            narrow.store(v, x, v.at(out, v.mul_index(out_row, i)), v.mul_index(d, out_step), stored)

        v.each(rows, lane)
        return []

    v.each(width, squares)
    v.loop(whole, Dv, 1, [], line)


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


transpose = emits(_transpose)
widen_rows = emits(_widen_rows)
write_rows = emits(_write_rows)
fill = emits(_fill)
fill_lanes = emits(_fill_lanes)
