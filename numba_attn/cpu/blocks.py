"""Walks over a block of queries and a tile of keys: rows, vectors, keys, a few at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any

from numba_attn.cpu.plan import HEIGHTS
from numba_attn.cpu.simd import Value, Vectors
from numba_attn.cpu.target import MANY_REGISTERS

LOG2_E = math.log2(math.e)
INFINITY = math.inf
# Exponentials at once: more hide the latency of each, fewer leave more registers.
AT_ONCE = 4 if MANY_REGISTERS else 2
LINE = 64  # bytes of a cache line

Rows = Callable[[Value, int], None]


def for_rows(v: Vectors, count: Value, heights: Sequence[int], body: Rows) -> None:
    """`body(first row, rows at once)` over `count` rows, in the largest steps first."""
    start = v.index(0)
    for height in heights:
        stop = v.whole_steps(start, count, height)

        def step(i: Value, _: list[Value], height: int = height) -> list[Value]:
            body(i, height)
            return []

        v.loop(start, stop, height, [], step)
        start = stop


def for_widths(v: Vectors, count: Value, widths: Sequence[int], body: Rows) -> None:
    """`body(first vector, vectors at once)` over `count` vectors, but twice two of them rather than three and one."""
    start = v.index(0)
    for width in widths:
        stop = v.whole_steps(start, count, width)
        if width == 3:
            one_left = v.builder.icmp_signed("==", v.builder.sub(count, stop), v.index(1))
            back = v.builder.and_(one_left, v.builder.icmp_signed(">", stop, start))
            stop = v.builder.select(back, v.add_index(stop, -width), stop)

        def step(first: Value, _: list[Value], width: int = width) -> list[Value]:
            body(first, width)
            return []

        v.loop(start, stop, width, [], step)
        start = stop


def for_width(
    build: Callable[..., Value | None], widths: Iterable[int] = tuple(HEIGHTS)
) -> Callable[..., Value | None]:
    """`build(v, width, ...)` for the one of the register tile's widths, of `widths`, that a block has at run time."""

    @wraps(build)
    def chosen(v: Vectors, width: Value, *values: Value, **fixed: Any) -> Value | None:
        return v.choose(width, {w: partial(build, v, w, *values, **fixed) for w in widths})

    return chosen


def for_vectors(v: Vectors, width: Value, body: Callable[[Value], object]) -> None:
    """`body(byte offset)` for each of the vectors of a block's row."""
    v.each(width, lambda w: body(v.mul_index(w, v.bytes)))


def fill_rows(v: Vectors, width: Value, x: Value, x_row: Value, n: Value, filling: Value) -> None:
    """`filling`, a vector, to `width` vectors of n rows that are `x_row` bytes apart."""
    v.each(n, lambda j: for_vectors(v, width, lambda here: v.store(filling, v.at(x, v.mul_index(j, x_row)), here)))


def for_keys(
    v: Vectors, n: Value, start: Sequence[Value], body: Callable[[Value, int, list[Value]], list[Value]]
) -> list[Value]:
    """`carried = body(first key, keys at once, carried)` over n keys: a few at once, as chains would be too slow."""
    whole = v.whole_steps(v.index(0), n, AT_ONCE)
    carried = v.loop(0, whole, AT_ONCE, start, lambda j, carried: body(j, AT_ONCE, carried))
    return v.loop(whole, n, 1, carried, lambda j, carried: body(j, 1, carried))


def lane_rows(v: Vectors, w: Value, count: Value) -> list[Value]:
    """The row of each lane of vector w of a block of `count` rows: the last one again beyond them."""
    first, last = v.mul_index(w, v.lanes), v.add_index(count, -1)
    return [v.least(v.add_index(first, i), last) for i in range(v.lanes)]
