"""Rows of an array into working memory, transposed; results out of it: all that knows how either is stored."""

from __future__ import annotations

from numba_attn.cpu.simd import Value, Vectors, emits
from numba_attn.cpu.tiles import lane_rows


def _whole_squares(v: Vectors, step: Value, count: Value) -> Value:
    """How many of `count` elements, `step` bytes apart, can be moved in squares of lanes x lanes."""
    contiguous = v.builder.icmp_signed("==", step, v.index(v.size))
    return v.builder.select(contiguous, v.whole_steps(v.index(0), count, v.lanes), v.index(0))


def _transpose(v, width, q, q_row, q_step, rows, D, qt):
    """qt (D, width vectors) = q.T; the last row again in lanes beyond `rows`."""
    row = v.mul_index(width, v.bytes)
    whole = _whole_squares(v, q_step, D)

    def squares(w: Value) -> None:
        lanes = [v.at(q, v.mul_index(q_row, i)) for i in lane_rows(v, w, rows)]

        def square(d: Value, _: list[Value]) -> list[Value]:
            columns = v.transpose([v.load(lane, v.mul_index(d, v.size)) for lane in lanes])
            for r, column in enumerate(columns):
                v.store(column, v.at(qt, v.mul_index(v.add_index(d, r), row)), v.mul_index(w, v.bytes))
            return []

        v.loop(0, whole, v.lanes, [], square)

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            source = v.at(q, v.mul_index(q_row, v.least(i, v.add_index(rows, -1))))
            x = v.load_scalar(source, v.mul_index(d, q_step))
            v.store(x, v.at(qt, v.mul_index(d, row)), v.mul_index(i, v.size))

        v.each(v.mul_index(width, v.lanes), lane)
        return []

    v.each(width, squares)
    v.loop(whole, D, 1, [], line)


def _write_rows(v, width, ot, Dv, out, out_row, out_step, rows):
    """out (rows, Dv) = ot.T."""
    row = v.mul_index(width, v.bytes)
    whole = _whole_squares(v, out_step, Dv)

    def squares(w: Value) -> None:
        first = v.mul_index(w, v.lanes)

        def square(d: Value, _: list[Value]) -> list[Value]:
            at = v.at(v.at(ot, v.mul_index(d, row)), v.mul_index(w, v.bytes))
            for i, line in enumerate(v.transpose([v.load(at, v.mul_index(row, r)) for r in range(v.lanes)])):
                lane = v.add_index(first, i)
                with v.builder.if_then(v.builder.icmp_signed("<", lane, rows)):
                    v.store(line, v.at(out, v.mul_index(out_row, lane)), v.mul_index(d, v.size))
            return []

        v.loop(0, whole, v.lanes, [], square)

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            x = v.load_scalar(v.at(ot, v.mul_index(d, row)), v.mul_index(i, v.size))
            v.store(x, v.at(out, v.mul_index(out_row, i)), v.mul_index(d, out_step))

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
        v.each(columns, lambda j: v.store(value, v.at(array, v.mul_index(i, row)), v.mul_index(j, step)))

    v.each(rows, line)


transpose = emits(_transpose)
write_rows = emits(_write_rows)
fill = emits(_fill)
fill_lanes = emits(_fill_lanes)
