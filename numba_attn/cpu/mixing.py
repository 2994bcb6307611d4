"""P.V of a few query rows, where vectors lie along the head and values are read in order, see `rows`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from numba_attn.cpu import narrow
from numba_attn.cpu.as_read import mix_one
from numba_attn.cpu.blocks import for_rows, for_widths
from numba_attn.cpu.emits import emits
from numba_attn.cpu.factors import Factors, factors_of, widened
from numba_attn.cpu.products import are_pairs
from numba_attn.cpu.simd import BYTES, I32, WORDS, Value, Vectors
from numba_attn.cpu.target import MANY_REGISTERS
from numba_attn.cpu.walk import (
    ALONE,
    FEW_OF_VALUES,
    FEW_QUANTIZED,
    VALUES_AGAIN,
    Ahead,
    Pages,
    Walk,
    row_at,
    times_asked,
)

# Output rows, and vectors of each, that are accumulated at once: as many as registers hold with what is multiplied.
# So many rows that values are read once.  One row has vectors for 128 numbers, so that those are read in order, even if
# a sum or two are then in memory, where there are 16 registers.
OUTPUTS = (
    {8: (2, 1), 4: (4, 2, 1), 2: (8, 4, 2, 1), 1: (8, 4, 2, 1)}
    if MANY_REGISTERS
    else {4: (3, 2, 1), 2: (6, 4, 2, 1), 1: (16, 8, 4, 2, 1)}
)
# Output rows, from which on each value is used so often that what else is done for a row of them takes time.
MANY = 4
NEAR = 16 * 1024  # bytes of values at once, which all query rows find in the first-level cache


def _mix(v, rows, value, offsets, ahead, row, until, page, Dv, n, p, stride, step, o):
    """o (rows, Dv) += p.T (rows, n) @ value (n, Dv), where p is (n, stride), as `factors.weights_of` leaves it.

    Dv is whole vectors.  Rows of the value are as those of k in `dots`; what is `ahead` is asked for once, whatever
    the number of rows.
    """
    factors, words = factors_of(v, "p"), v.pointees["p"] == WORDS
    walk, vectors = Walk(value, offsets, n, row, until, page), v.builder.sdiv(Dv, v.index(v.lanes))
    product = _Product(v, factors, walk, ahead, vectors, Dv, p, v.mul_index(stride, v.size), step, o)
    few = FEW_QUANTIZED if words else FEW_OF_VALUES
    form, forms = v.index(0), {0: partial(product.of_rows, rows, [*OUTPUTS], True)}
    is_few = v.builder.icmp_signed("<=", rows, v.index(few))
    if words:
        form, forms[1] = v.builder.select(is_few, v.index(1), form), partial(product.of_one_row, True)
    if ALONE:
        alone = v.builder.and_(is_few, v.builder.icmp_signed("==", ahead, v.index(0)))
        form = v.builder.select(alone, v.index(2), form)
        of_few = partial(product.of_rows, rows, [h for h in OUTPUTS if h <= few])
        forms[2] = partial(product.of_one_row if words else of_few, False)
    v.choose(form, forms)


class _Product(NamedTuple):
    """What `_mix` is called with."""

    v: Vectors
    factors: Factors
    walk: Walk
    ahead: Value
    vectors: Value  # of a row
    Dv: Value
    p: Value
    p_row: Value
    step: Value
    o: Value

    def of_rows(self, rows: Value, heights: list[int], asked: bool) -> None:
        def keys(begin: Value, end: Value) -> None:
            pages = self.walk.pages_of(self.v, begin, end)
            for_rows(self.v, rows, heights, partial(self._some_rows, pages, asked))

        _near(self.v, self.walk.n, self.Dv, keys)

    def _some_rows(self, keys: Pages, asked: bool, first: Value, height: int) -> None:
        def block(vector: Value, width: int) -> None:
            _Block(self, keys, first, height, vector, width).add(asked)

        for_widths(self.v, self.vectors, self.widths_of(height), block)

    def of_one_row(self, asked: bool) -> None:
        """Of words."""
        v = self.v

        def block(vector: Value, width: int) -> None:
            out, later = v.at(self.o, v.mul_index(vector, v.bytes)), self.later(1, asked)
            mix_one(v, self.factors, self.walk, later, self.ahead, vector, width, self.Dv, self.p, self.p_row, out)

        for_rows(v, self.vectors, self.widths_of(1), block)

    def widths_of(self, height: int) -> list[int]:
        """Of integers, and of two keys side by side, so many vectors as `narrow` makes of them."""
        plain = self.factors.together == 1 and BYTES[self.v.pointees["value"]] > 1
        return [width for width in OUTPUTS[height] if plain or width in (8, 4, 2, 1)]

    def later(self, height: int, asked: bool) -> Ahead:
        stored = self.v.pointees["value"]
        shifts = times_asked(self.v, height, stored, VALUES_AGAIN) if asked else ()
        return Ahead(self.walk.base, self.walk.offsets, self.vectors, self.v.lanes * BYTES[stored], shifts)


class _Block(NamedTuple):
    """So many output rows and vectors of each, from the first ones on, and the values of some keys."""

    of: _Product
    keys: Pages
    first: Value
    height: int
    vector: Value
    width: int

    def add(self, asked: bool) -> None:
        """o += p.T @ value."""
        b, is_first = self.of.v.builder, self.of.v.builder.icmp_signed("==", self.first, self.of.v.index(0))
        if self.of.factors.together == 2 or self.height < MANY:
            self._in_turn(b.select(is_first, self.of.ahead, self.of.v.index(0)), asked)
            return
        with b.if_else(is_first) as (first, others):
            with first:
                self._page_by_page(asked)
            with others:
                self._page_by_page(False)

    def _in_turn(self, ahead: Value, asked: bool) -> None:
        v, (begin, end, _, _) = self.of.v, self.keys
        at_once, walk, later = self.of.factors.together, self.of.walk, self.of.later(self.height, asked)
        next_one = self._next_ones(later, ahead)
        sums_from = 3 + len(next_one)

        def some(j: Value, carried: list[Value]) -> list[Value]:
            weight, at, next_one, rows = carried[0], carried[1:3], carried[3:sums_from], []
            for i in range(at_once):
                rows.append(at[0])
                at = walk.follow(v, at, v.add_index(j, i + 1))
                next_one = later.ask(v, next_one, self.width)
            return [v.at(weight, self.of.p_row), *at, *next_one, *self._sums(rows, weight, carried[sums_from:])]

        start = [self._weights(), *walk.begin(v, begin), *next_one, *self._nothing()]
        self._put(v.loop(begin, end, at_once, start, some, rolled=True)[sums_from:])

    def _page_by_page(self, asked: bool) -> None:
        v, later = self.of.v, self.of.later(self.height, asked)
        next_one = self._next_ones(later, self.of.ahead)
        sums_from = 1 + len(next_one)

        def key(row: Value, carried: list[Value]) -> list[Value]:
            weight, next_one = carried[0], later.ask(v, carried[1:sums_from], self.width)
            return [v.at(weight, self.of.p_row), *next_one, *self._sums([row], weight, carried[sums_from:])]

        start = [self._weights(), *next_one, *self._nothing()]
        self._put(self.of.walk.page_by_page(v, self.keys, start, key)[sums_from:])

    def _next_ones(self, later: Ahead, ahead: Value) -> list[Value]:
        """What is asked for next: the columns before these have asked for as many vectors as they have."""
        v, (begin, end, _, _) = self.of.v, self.keys
        return later.begin(v, begin, ahead, v.mul_index(self.vector, v.builder.sub(end, begin)))

    def _weights(self) -> Value:
        v, begin = self.of.v, self.keys.begin
        at = v.half(begin) if self.of.factors.together == 2 else begin
        return v.at(v.at(self.of.p, v.mul_index(at, self.of.p_row)), v.mul_index(self.first, v.size))

    def _nothing(self) -> list[Value]:
        return [self.of.factors.zero] * (self.height * self.width)

    def _sums(self, rows: list[Value], weight: Value, sums: list[Value]) -> list[Value]:
        """The sums with a row of values, or with two rows of which an element is a pair or two words."""
        v, factors, Dv, stored = self.of.v, self.of.factors, self.of.Dv, self.of.v.pointees["value"]
        column, two = v.mul_index(self.vector, v.lanes), factors.together == 2
        weights = [v.load_scalar(weight, r * v.size, I32 if two else None) for r in range(self.height)]
        if two:
            low, high = rows
            values = narrow.load_side_by_side(v, low, high, column, Dv, self.width, stored, in_order=False)
        else:
            (row,) = rows
            values = widened(v, row, column, Dv, stored, self.width)
            if BYTES[stored] == 1:
                scale = narrow.load_scale(v, row, Dv, stored)
                weights = [v.builder.fmul(x, scale) for x in weights]
        terms = ((x, y) for x in map(v.splat, weights) for y in values)
        return [factors.multiply(y, x, total) for (x, y), total in zip(terms, sums, strict=True)]

    def _put(self, sums: list[Value]) -> None:
        """Add sums to the output: by steps, if they are of words."""
        v, factors, words = self.of.v, self.of.factors, self.of.v.pointees["p"] == WORDS
        for r in range(self.height):
            row = v.add_index(self.first, r)
            place = v.add_index(v.mul_index(row, self.of.Dv), v.mul_index(self.vector, v.lanes))
            out = v.at(self.of.o, v.mul_index(place, v.size))
            steps = v.splat(v.load_scalar(self.of.step, v.mul_index(row, v.size))) if words else None
            numbers = [factors.as_numbers(x) for x in sums[r * self.width : (r + 1) * self.width]]
            for w, more in enumerate(narrow.in_order(v, numbers) if factors.together == 2 else numbers):
                total = v.load(out, w * v.bytes)
                v.store(v.fma(more, steps, total) if words else v.add(total, more), out, w * v.bytes)


def _mix_carefully(v, rows, value, offsets, row, until, page, Dv, n, p, stride, step, o):
    """The same bits, except that the values of masked keys (p = -0.0) are not used even where they are not finite."""
    if v.pointees["p"] == WORDS:  # integers are finite, and no scale of a masked key is in the words
        _mix(v, rows, value, offsets, v.index(0), row, until, page, Dv, n, p, stride, step, o)
        return
    stored, b, p_row, pairs = v.pointees["value"], v.builder, v.mul_index(stride, v.size), are_pairs(v, "p")
    zero = v.constant(0.0)

    def key(row: Value, column: Value, j: Value, acc: list[Value]) -> list[Value]:
        number = v.load_scalar(v.at(p, v.mul_index(j, p_row)), v.mul_index(row, v.size))
        of_key = row_at(v, value, offsets, j)
        (x,), weight = widened(v, of_key, column, Dv, stored), v.splat(number)
        is_masked = v.is_negative_zero(weight)
        if BYTES[stored] == 1:  # a scale may be what is not finite
            weight = v.splat(b.fmul(number, narrow.load_scale(v, of_key, Dv, stored)))
        x, weight = v.select(is_masked, zero, x), v.select(is_masked, zero, weight)
        return [v.fma(x, weight, acc[0])]

    def two_keys(row: Value, column: Value, j: Value, acc: list[Value]) -> list[Value]:
        weight = v.load_scalar(v.at(p, v.mul_index(v.half(j), p_row)), v.mul_index(row, v.size), I32)
        low, high = (row_at(v, value, offsets, v.least(v.add_index(j, i), v.add_index(n, -1))) for i in range(2))
        (x,) = narrow.load_side_by_side(v, low, high, column, Dv, 1, stored)
        for half, negative_zero in ((0xFFFF, 0x8000), (0xFFFF0000, 0x80000000)):
            is_masked = b.icmp_unsigned("==", b.and_(weight, I32(half)), I32(negative_zero))
            x = b.and_(x, v.splat(b.select(is_masked, I32(0xFFFFFFFF ^ half), I32(0xFFFFFFFF))))
        return [v.dot(x, v.splat(weight), acc[0])]

    some_keys, at_once = (two_keys, 2) if pairs else (key, 1)

    def columns(begin: Value, end: Value, row: Value) -> None:
        def some(column: Value, _: list[Value]) -> list[Value]:
            at = v.at(o, v.mul_index(v.add_index(v.mul_index(row, Dv), column), v.size))
            v.store(v.add(v.load(at), v.loop(begin, end, at_once, [zero], partial(some_keys, row, column))[0]), at)
            return []

        v.loop(0, Dv, v.lanes, [], some)

    _near(v, n, Dv, lambda begin, end: v.each(rows, partial(columns, begin, end)))


def _near(v: Vectors, n: Value, Dv: Value, body: Callable[[Value, Value], object]) -> None:
    """`body(first, end)` for so few of n keys at once, an even number, that their values stay in the nearest cache."""
    two = v.mul_index(v.add_index(v.mul_index(Dv, BYTES[v.pointees["value"]]), 1), 2)  # bytes of two rows, at least 1
    some = v.mul_index(v.add_index(v.builder.sdiv(v.index(NEAR), two), 1), 2)

    def keys(first: Value, _: list[Value]) -> list[Value]:
        body(first, v.least(v.add_index(first, some), n))
        return []

    v.loop(0, n, some, [], keys)


mix = emits(_mix, apart=True)
mix_carefully = emits(_mix_carefully)
