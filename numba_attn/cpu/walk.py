"""How the products of few query rows go from one row of K or V to the next: evenly, but for the ends of pages.

Where a row is must not come from memory.  A load that waits for its address is sent late and out of turn, and then
neither the processor nor its prefetching is ahead of what is used: half of the bandwidth of one core of Zen 4.  So an
address is the last one and some bytes, which is known long before, and tables are for the first row, the first ones
of pages, and what is asked for ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from numba import types

from numba_attn.cpu import target
from numba_attn.cpu.blocks import LINE
from numba_attn.cpu.simd import BYTES, I64, Value, Vectors

# Query rows, with keys, with values, and where both are integers, for which so little is done with a row that hardware
# keeps up alone, if it is let alone: asking for lines then takes longer than it saves.  Values are not read in order
# for two rows where there are too few registers for the sums of both.
FEW, FEW_OF_VALUES, FEW_QUANTIZED = 2, 2 if target.MANY_REGISTERS else 1, 1
ALONE = target.PREFETCH == 2
# Hardware drops requests that come while many lines are on their way.  So lines are asked for again, half as far ahead
# and less (as shifts): of keys and of values for so few query rows that they wait for memory, and not for products;
# with 16 registers of keys alone, where these are read one at a time.
KEYS_AGAIN, VALUES_AGAIN = ((2,), (1, 3)) if target.MANY_REGISTERS else ((1, 3), ())
FEW_AGAIN = 4 if ALONE else 0
# Of a page, asked for when the one before it begins: from these on, hardware foresees the others.
FIRST_LINES = 2

Body = Callable[[Value, list[Value]], list[Value]]


def times_asked(v: Vectors, height: int, stored: types.Type, again: tuple[int, ...]) -> tuple[int, ...]:
    """When lines of rows are asked for, as shifts of how far ahead, for so many query rows."""
    wanted = height <= FEW_AGAIN if target.MANY_REGISTERS else height == v.lanes
    return (0, *again) if wanted and BYTES[stored] > 1 else (0,)


def row_at(v: Vectors, base: Value, offsets: Value, j: Value) -> Value:
    """Where row j starts: `offsets` are those of all rows from `base`, in bytes."""
    return v.at(base, v.load_scalar(offsets, v.mul_index(j, 8), I64))


class Ahead(NamedTuple):
    """Rows of so many vectors of `size` bytes, asked for a few at a time, in the order of memory.

    That is done once for each of the shifts of how far ahead, or not at all if there is none.
    """

    base: Value
    offsets: Value
    vectors: Value
    size: int
    shifts: tuple[int, ...]

    def begin(self, v: Vectors, row: Value, ahead: Value, done: Value) -> list[Value]:
        """What comes next, if so many vectors ahead of a row have been asked for: its place, vectors left, and row."""
        b, found = v.builder, []
        for shift in self.shifts:
            first = v.add_index(row, b.ashr(ahead, v.index(shift)))
            here, vector = v.add_index(first, b.sdiv(done, self.vectors)), b.srem(done, self.vectors)
            start = row_at(v, self.base, self.offsets, here)
            found += [v.at(start, v.mul_index(vector, self.size)), b.sub(self.vectors, vector), here]
        return found

    def ask(self, v: Vectors, at: list[Value], width: int) -> list[Value]:
        """Ask for so many, no more than a row has; the next ones.

        Behind the last vector of a row the next row is looked up, even if none of it is then asked for.
        """
        return [x for i in range(0, len(at), 3) for x in self._ask(v, at[i : i + 3], width)]

    def _ask(self, v: Vectors, at: list[Value], width: int) -> list[Value]:
        b, (place, left, row) = v.builder, at
        for w in range(0, width, max(1, LINE // self.size)):
            v.prefetch(place, w * self.size)
        place, left = v.at(place, width * self.size), v.add_index(left, -width)
        before, ended, there = b.block, b.append_basic_block("ended"), b.append_basic_block("there")
        b.cbranch(b.icmp_signed("<=", left, v.index(0)), ended, there)
        b.position_at_end(ended)
        following = v.add_index(row, 1)
        start = v.at(row_at(v, self.base, self.offsets, following), v.mul_index(left, -self.size))
        changed = [start, v.add_index(left, self.vectors), following]
        b.branch(there)
        b.position_at_end(there)
        phis = [b.phi(x.type) for x in changed]
        for phi, same, other in zip(phis, [place, left, row], changed, strict=True):
            phi.add_incoming(same, before)
            phi.add_incoming(other, ended)
        return phis


class Pages(NamedTuple):
    """Rows [begin, end), of which those from `until` on lie behind the end of the first one's page; pages in all."""

    begin: Value
    end: Value
    until: Value
    count: Value


class Walk(NamedTuple):
    """n rows of a tile: `row` bytes apart up to row `until`, and then up to each `page` rows more.

    Behind the last one it is there again.
    """

    base: Value
    offsets: Value
    n: Value
    row: Value
    until: Value
    page: Value

    def begin(self, v: Vectors, j: Value) -> list[Value]:
        """Where row j starts, and the next one that does not lie behind the one before it."""
        return [row_at(v, self.base, self.offsets, j), v.least(self._end_of_page(v, j), self.n)]

    def _end_of_page(self, v: Vectors, j: Value) -> Value:
        b, beyond = v.builder, v.builder.sub(j, self.until)
        pages = v.add_index(b.sdiv(beyond, self.page), 1)
        later = v.add_index(self.until, v.mul_index(pages, self.page))
        return b.select(b.icmp_signed("<", beyond, v.index(0)), self.until, later)

    def follow(self, v: Vectors, at: list[Value], j: Value) -> list[Value]:
        """The same for row j, from that of the row before it."""
        b, (last, until) = v.builder, at
        evenly, jump, there = (b.append_basic_block(name) for name in ("evenly", "page", "there"))
        # A branch, which is foreseen: a choice of addresses would wait for both.
        b.cbranch(b.icmp_signed("==", j, until), jump, evenly)
        b.position_at_end(evenly)
        near = v.at(last, self.row)
        b.branch(there)
        b.position_at_end(jump)
        far = row_at(v, self.base, self.offsets, v.least(j, v.add_index(self.n, -1)))
        later = v.least(v.add_index(until, self.page), self.n)
        self._ask_for_page(v, later)
        later = b.select(b.icmp_signed("<", j, self.n), later, v.add_index(j, 1))
        b.branch(there)
        b.position_at_end(there)
        row, next_page = b.phi(near.type), b.phi(I64)
        for phi, same, other in ((row, near, far), (next_page, until, later)):
            phi.add_incoming(same, evenly)
            phi.add_incoming(other, jump)
        return [row, next_page]

    def _ask_for_page(self, v: Vectors, j: Value) -> None:
        """Ask for the first lines of the page that begins with row j, if there is one."""
        start = row_at(v, self.base, self.offsets, v.least(j, v.add_index(self.n, -1)))
        for line in range(FIRST_LINES):
            v.prefetch(start, line * LINE)

    def pages_of(self, v: Vectors, begin: Value, end: Value) -> Pages:
        until = self._end_of_page(v, begin)
        others = v.most(v.builder.sub(end, until), v.index(0))
        count = v.builder.sdiv(v.add_index(v.add_index(others, self.page), -1), self.page)
        return Pages(begin, end, until, v.add_index(count, 1))

    def page_by_page(self, v: Vectors, pages: Pages, carried: list[Value], body: Body) -> list[Value]:
        """`carried = body(where a row starts, carried)` for rows in order, with nothing to decide at each."""
        begin, end, until, count = pages

        def page(i: Value, carried: list[Value]) -> list[Value]:
            stop = v.add_index(until, v.mul_index(i, self.page))
            start = v.most(v.builder.sub(stop, self.page), begin)

            def row(_: Value, carried: list[Value]) -> list[Value]:
                return [v.at(carried[0], self.row), *body(carried[0], carried[1:])]

            place = row_at(v, self.base, self.offsets, start)
            self._ask_for_page(v, stop)
            return v.loop(start, v.least(stop, end), 1, [place, *carried], row, rolled=True)[1:]

        return v.loop(0, count, 1, carried, page, rolled=True)
