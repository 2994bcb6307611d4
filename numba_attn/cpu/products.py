"""The product of a tile, as a register-tile micro-kernel: of both, queries with keys and probabilities with values."""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from numba_attn.cpu import target
from numba_attn.cpu.blocks import LINE
from numba_attn.cpu.plan import HEIGHTS
from numba_attn.cpu.simd import I32, PAIRS, Value, Vectors

# Steps of a product at once, in the largest register tiles: that saves operations that are not multiply-adds, which
# take time where another thread of the same core takes its share of what is done in a cycle.
STEPS = 4
LONG = 256  # elements of a head, from which on one sum of all would be noticeably less exact than a library's

Ahead = tuple[Value, Value] | None  # memory to be asked for: from where on, and bytes of each element


def product(
    v: Vectors,
    a: Value,
    a_row: Value,
    a_step: Value,
    b: Value,
    count: Value,
    height: int,
    width: int,
    pairs: bool = False,
    b_row: Value | None = None,
    acc: list[Value] | None = None,
    ahead: Ahead = None,
    single: bool = False,
) -> list[Value]:
    """acc[i, :] += sum over k < count of a[i, k] * b[k, :], with all of acc, which is 0 if None, in registers.

    a is read element by element at byte strides (a_row, a_step); b is (count, width vectors), its rows `b_row` bytes
    apart, contiguous if None.  Of `pairs` of bfloat16 numbers, an element holds two, and `count` numbers make half as
    many elements.  Memory `ahead` is asked for meanwhile: from where on, and so many bytes for each number of a.  There
    is little code for `single` elements only.
    """
    if pairs:
        count = v.half(count)
    if b_row is None:
        b_row = v.index(width * v.bytes)
    # Four rows share a pointer, as x86 addresses p, p + r, p + 2r and p + 3r; rows next to each other all do.  If LLVM
    # knew the distance between pointers, it would walk from each row to the next, in a chain of additions that takes
    # longer than the products; and unrolling the loop, it would run out of registers for addresses.
    neighbours = isinstance(a_row, ir.Constant) and a_row.constant == v.size
    share = height if neighbours else 4
    reach = [v.mul_index(a_row, i) for i in range(min(height, share))]
    starts = [v.opaque(v.at(a, v.mul_index(a_row, i))) if i else a for i in range(0, height, share)]
    places = [] if ahead is None else [ahead[0]]
    pointers = 1 + len(starts) + len(places)

    def step(b: Value, starts: list[Value], on: int, acc: list[Value]) -> list[Value]:
        columns = [(v.load_pairs if pairs else v.load)(b, w * v.bytes) for w in range(width)]
        for i in range(height):
            at = v.at(starts[i // share], reach[i % share])
            factor = v.splat(v.load_scalar(at, on, I32 if pairs else None))
            for w in range(width):
                acc[i * width + w] = (v.dot if pairs else v.fma)(factor, columns[w], acc[i * width + w])
        return acc

    def steps(_: Value, carried: list[Value], at_once: int) -> list[Value]:
        (b, *starts), acc = carried[:pointers], carried[pointers:]
        places = []
        if ahead is not None:
            place, elements = starts.pop(), height * at_once
            for line in range(0, elements * v.size, LINE):
                v.prefetch(place, line, target.SECOND_LEVEL)
            places = [v.at(place, v.mul_index(ahead[1], 2 * elements if pairs else elements))]
        if neighbours:
            for _ in range(at_once - 1):
                acc = step(b, starts, 0, acc)
                # LLVM would load all of what is to come first, and spill it, if it knew where that is.
                b, *starts = v.opaque(v.at(b, b_row)), *(v.opaque(v.at(p, a_step)) for p in starts)
            at_once = 1
        for i in range(at_once):
            acc = step(v.at(b, v.mul_index(b_row, i)) if i else b, starts, i * v.size, acc)
        beyond = v.mul_index(a_step, at_once)
        return [v.at(b, v.mul_index(b_row, at_once)), *(v.at(p, beyond) for p in starts), *places, *acc]

    carried = [b, *starts, *places, *(acc or [v.constant(0.0)] * (height * width))]
    start = v.index(0)
    if width > 1 and height == HEIGHTS.get(width, [0])[0] and not pairs and not single:
        whole = v.whole_steps(start, count, STEPS)
        if not neighbours:
            # The next elements of contiguous rows are at constant distances, which cost no register.
            contiguous = v.builder.icmp_signed("==", a_step, v.index(v.size))
            whole = v.builder.select(contiguous, whole, start)
        carried = v.loop(start, whole, STEPS, carried, partial(steps, at_once=STEPS), rolled=True)
        start = whole
    return v.loop(start, count, 1, carried, partial(steps, at_once=1), rolled=True)[pointers:]


def product_of_heads(
    v: Vectors,
    a: Value,
    a_row: Value,
    a_step: Value,
    b: Value,
    count: Value,
    height: int,
    width: int,
    pairs: bool = False,
    b_row: Value | None = None,
    ahead: Ahead = None,
) -> list[Value]:
    """`product`, but sums of more than LONG elements are made in parts, each from zero, and then added up."""
    b_row = v.index(width * v.bytes) if b_row is None else b_row
    last = v.mul_index(v.builder.sdiv(v.most(v.add_index(count, -1), v.index(0)), v.index(LONG)), LONG)
    kept = v.room(height * width)

    def from_element(first: Value) -> tuple[Value, Value, Value, Value]:
        number = v.half(first) if pairs else first
        return v.at(a, v.mul_index(number, a_step)), a_row, a_step, v.at(b, v.mul_index(number, b_row))

    def part(first: Value, _: list[Value]) -> list[Value]:
        is_first = v.builder.icmp_signed("==", first, v.index(0))
        acc = product(v, *from_element(first), v.index(LONG), height, width, pairs, b_row, single=True)
        for x, more in enumerate(acc):
            before = v.builder.select(is_first, v.constant(0.0), v.load(kept, x * v.bytes))
            v.store(v.add(before, more), kept, x * v.bytes)
        return []

    def add(_: Value, acc: list[Value]) -> list[Value]:
        return [v.add(v.load(kept, x * v.bytes), more) for x, more in enumerate(acc)]

    v.loop(0, last, LONG, [], part, rolled=True)
    rest = v.builder.sub(count, last)
    acc = product(v, *from_element(last), rest, height, width, pairs, b_row, ahead=ahead)
    return v.loop(0, v.least(last, v.index(1)), 1, acc, add)


def are_pairs(v: Vectors, operand: str) -> bool:
    """Whether the products of a stage are those of pairs, as one of its pointers tells."""
    pairs = v.pointees[operand] == PAIRS
    if pairs and not target.HAS_BFLOAT16_PAIRS:
        raise NotImplementedError("products of bfloat16 pairs need AVX512-BF16")
    return pairs


def ask_for_rows(v: Vectors, rows: Value, row: Value, D: Value, height: int) -> None:
    """Prefetch `height` rows of D contiguous elements, `row` bytes apart."""

    def lines(d: Value, _: list[Value]) -> list[Value]:
        for i in range(height):
            v.prefetch(v.at(rows, v.mul_index(row, i)), d)
        return []

    v.loop(0, v.mul_index(D, v.size), LINE, [], lines)


def ahead_of(v: Vectors, ahead: Ahead, first: Value, height: int, width: int) -> Ahead:
    """For `product`: the part of the next tile's elements that belongs to rows whose elements begin with `first`.

    In small register tiles, nothing.
    """
    if ahead is None or width == 1 or height != HEIGHTS[width][0]:
        return None
    start, size = ahead
    return v.at(start, v.mul_index(first, size)), size
