"""Walks over a block of queries and a tile of keys: rows, vectors, keys, a few at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

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


class Keys(NamedTuple):
    """The keys that a vector of scores has, of so many elements each: several, if these are less than a vector."""

    v: Vectors
    stride: Value
    count: Value

    @classmethod
    def of(cls, v: Vectors, stride: Value) -> Keys:
        stride = v.least(stride, v.index(v.lanes))
        return cls(v, stride, v.builder.udiv(v.index(v.lanes), stride))

    def of_lanes(self) -> list[Value]:
        """Which of the keys each lane is of."""
        v = self.v
        return [v.builder.udiv(v.mul_index(i, self.count), v.index(v.lanes)) for i in range(v.lanes)]

    def numbers(self) -> Value:
        """The same as a vector of numbers."""
        return self.v.beside([self.v.builder.uitofp(i, self.v.element) for i in self.of_lanes()])

    def step(self) -> Value:
        """How many keys further the next vector is, as a vector of numbers."""
        return self.v.splat(self.v.builder.uitofp(self.count, self.v.element))

    def vectors(self, n: Value) -> Value:
        """How many vectors, one behind the other, have all of n keys."""
        return self.v.builder.udiv(self.v.add_index(self.v.add_index(n, self.count), -1), self.count)


class Lanes(NamedTuple):
    """What is read for the lanes of a block of `count` rows: of one head after the other, with `rows` each.

    These lie so many bytes apart, and the last one is read again for the lanes beyond them.  Where a vector has several
    keys, rows are there once for each.
    """

    v: Vectors
    rows: Value
    count: Value
    row: Value
    to_next_head: Value  # from where a head would go on
    heads_in_row: Value  # of which lane times so many are as many heads as are before it, times 2 ** 16
    keys: Keys

    @classmethod
    def of(cls, v: Vectors, rows: Value, count: Value, row: Value, head: Value, keys: Keys | None = None) -> Lanes:
        inverse = v.add_index(v.builder.udiv(v.index(1 << 16), rows), 1)
        keys = keys or Keys(v, v.index(v.lanes), v.index(1))
        return cls(v, rows, count, row, v.builder.sub(head, v.mul_index(rows, row)), inverse, keys)

    def place(self, start: Value, lane: Value) -> Value:
        """The address of what is read for a lane, if `start` is that of the first."""
        v, (number, heads) = self.v, self._number(lane)
        return v.at(v.at(start, v.mul_index(number, self.row)), v.mul_index(heads, self.to_next_head))

    def places(self, start: Value, w: Value) -> list[Value]:
        """The addresses for the lanes of vector w."""
        return [self.place(start, lane) for lane in self._of_vector(w)]

    def rows_of_heads(self, w: Value) -> list[Value]:
        """Which row of its head the lanes of vector w are."""
        numbers = (self._number(lane) for lane in self._of_vector(w))
        return [self.v.builder.sub(number, self.v.mul_index(heads, self.rows)) for number, heads in numbers]

    def _of_vector(self, w: Value) -> list[Value]:
        v, first = self.v, self.v.mul_index(w, self.v.lanes)
        before = [v.mul_index(key, self.keys.stride) for key in self.keys.of_lanes()]
        return [v.add_index(first, v.builder.sub(v.index(i), x)) for i, x in enumerate(before)]

    def _number(self, lane: Value) -> tuple[Value, Value]:
        """Of the row that is read for a lane, and of the heads before its own."""
        number = self.v.least(lane, self.v.add_index(self.count, -1))
        return number, self.v.builder.lshr(self.v.mul_index(number, self.heads_in_row), self.v.index(16))
