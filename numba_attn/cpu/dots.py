"""K.Q of a few query rows, where vectors lie along the head and keys are read in order, see `rows`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir
from numba import types

from numba_attn.cpu import narrow, target
from numba_attn.cpu.blocks import LINE
from numba_attn.cpu.emits import emits
from numba_attn.cpu.factors import Factors, factors_of, powers_of_two, scales_of, widened
from numba_attn.cpu.simd import BYTES, WORDS, Value, Vectors
from numba_attn.cpu.walk import ALONE, FEW, FEW_QUANTIZED, KEYS_AGAIN, Walk, row_at, times_asked
from numba_attn.storage import TOGETHER

# Keys that are read side by side.  With 32 registers so few that memory is read in order but for that, as hardware
# foresees; with 16, as many as there are sums in a vector, as fewer wait for each other.
BESIDE = 2 if target.MANY_REGISTERS else target.VECTOR_BYTES // 4
WHOLE_ROWS = not target.MANY_REGISTERS  # rows read side by side are asked for one by one, not a line of each in turns
UNROLLED = 8  # vectors of a row at once, for one query row: a loop for each takes as long as they do
COLUMNS = 128  # elements of a row at once at most, as many heads have
HEAD_SIZES = 64, COLUMNS  # for which there is a form without loops over a row, whose queries stay in registers,
REGISTERS = 16  # if they take no more
OTHERS, ASKED = 0, 1  # forms for other sizes, and where keys are asked for

Dots = Callable[[Value, list[Value]], list[Value]]  # of a row, and others to ask for


def in_order(height: int, stored: types.Type) -> bool:
    """Whether keys are read one by one, for so few query rows that hardware keeps up alone."""
    return ALONE and height <= (FEW_QUANTIZED if BYTES[stored] == 1 else FEW)


def _dots(v, height, k, offsets, ahead, row, until, page, n, held, D, q, step, s):
    """s (n, height) = k (n, held).q (height, D) for a height that is a power of two.

    D is whole vectors of q, which is as `factors` says, of words in steps.  So many elements of k are held, whole
    vectors of numbers; q is 0 beyond them.  Where rows of k are is as in `Walk`; those `ahead` of each are asked for.
    Whole vectors of s are written.  Rows of q lie vector beside vector, see `beside`.
    """
    arguments = Walk(k, offsets, n, row, until, page), ahead, held, D, q, step, s, v.room(v.lanes)
    v.choose(height, {rows: partial(_dots_of, v, rows, *arguments) for rows in powers_of_two(v.lanes)})


def _dots_of(
    v: Vectors, height: int, walk: Walk, ahead: Value, held: Value, D: Value, q: Value, step: Value, s: Value,
    kept: Value,
) -> None:  # fmt: skip
    stored, factors, last = v.pointees["k"], factors_of(v, "q"), v.add_index(walk.n, -1)
    words = v.pointees["q"] == WORDS
    steps = [v.load_scalar(step, r * v.size) for r in range(height)] if words and in_order(height, stored) else []
    keys, at_once = v.lanes // height, min(v.lanes // height, BESIDE)
    aheads = [v.builder.ashr(ahead, v.index(shift)) for shift in times_asked(v, height, stored, KEYS_AGAIN)]

    def row(j: Value, i: int | Value) -> Value:
        return row_at(v, walk.base, walk.offsets, v.least(v.add_index(j, i), last))

    def later(j: Value, i: int | Value, count: int) -> list[Value]:
        """Where what is asked for with so many rows begins."""
        numbers = [v.least(v.add_index(j, i if n == 0 else v.add_index(i, n)), last) for n in range(count)]
        return [row_at(v, walk.base, walk.offsets, v.add_index(x, on)) for on in aheads for x in numbers]

    def side_by_side(j: Value, rows: list[Value]) -> list[Value]:
        """The sums of all keys of a vector of scores, a few rows at a time."""
        sums = []
        for i in range(0, keys, at_once):
            sums += _dots_beside(v, factors, rows[i : i + at_once], later(j, i, at_once), height, held, D, q)
        return sums

    def one_by_one(j: Value, at: list[Value], dots_of: Dots, asking: bool) -> tuple[list[Value], list[Value]]:
        """The same in the order of memory, which hardware foresees: a loop, or LLVM reads parts of rows in turns."""

        def key(i: Value, at: list[Value]) -> list[Value]:
            totals = dots_of(at[0], later(j, i, 1) if asking else [])
            if BYTES[stored] == 1:
                scale = narrow.load_scale(v, at[0], D, stored)
                scales = [v.splat(v.builder.fmul(scale, x)) for x in steps] if steps else [v.splat(scale)] * height
                totals = [v.mul(factors.as_numbers(total), x) for total, x in zip(totals, scales, strict=True)]
            for r, total in enumerate(totals):
                v.store(total, kept, v.add_index(v.mul_index(i, height * v.bytes), r * v.bytes))
            return walk.follow(v, at, v.add_index(v.add_index(j, i), 1))

        at = v.loop(0, keys, 1, at, key, rolled=True)
        return [v.load(kept, i * v.bytes) for i in range(v.lanes)], at

    def some(j: Value, _: list[Value]) -> list[Value]:
        scales, rows = None, [row(j, i) for i in range(keys)]
        if BYTES[stored] == 1:
            # Loaded first: with what comes last, there is nothing left to do while they are waited for.
            scales = scales_of(v, rows, D, stored, height)
        scores = factors.as_numbers(_sums_across(v, side_by_side(j, rows), factors.add))
        if scales is not None:
            scores = v.mul(scores, v.mul(scales, v.load(step)) if words else scales)
        v.store(scores, v.at(s, v.mul_index(j, height * v.size)))
        return []

    def of_any(row: Value, later: list[Value]) -> list[Value]:
        return _dots_beside(v, factors, [row], later, height, held, D, q)

    def in_turn(dots_of: Dots, asking: bool) -> None:
        def some(j: Value, at: list[Value]) -> list[Value]:
            sums, at = one_by_one(j, at, dots_of, asking)
            v.store(_sums_across(v, sums, v.add), v.at(s, v.mul_index(j, height * v.size)))
            return at

        v.loop(0, walk.n, keys, walk.begin(v, v.index(0)), some)

    def of_size(D: int) -> None:
        """Keys of so many elements, of which none is asked for."""
        vectors = D // (factors.together * v.lanes)
        in_turn(partial(_dots_of_whole, v, factors, _queries(v, factors, vectors, height, q)), False)

    if not in_order(height, stored):
        v.loop(0, walk.n, keys, [], some)
    else:
        few = height * COLUMNS <= REGISTERS * factors.together * v.lanes and stored != narrow.INT4
        forms: dict[int, Callable[[], None]] = {x: partial(of_size, x) for x in HEAD_SIZES if few}
        form = v.index(OTHERS)
        for x in forms:
            form = v.builder.select(v.builder.icmp_signed("==", held, v.index(x)), v.index(x), form)
        form = v.builder.select(v.builder.icmp_signed("==", ahead, v.index(0)), form, v.index(ASKED))
        forms |= {OTHERS: partial(in_turn, of_any, False), ASKED: partial(in_turn, of_any, True)}
        v.choose(form, forms)


def _elements(v: Vectors, factors: Factors, row: Value, d: Value, D: Value, vectors: int) -> list[Value]:
    """So many vectors of a row of K from d on, as they are multiplied."""
    stored, lanes = v.pointees["k"], factors.together * v.lanes
    if factors.together == 2:
        return narrow.load_words(v, row, d, D, vectors * lanes, lanes, stored)
    return widened(v, row, d, D, stored, vectors)


def _queries(v: Vectors, factors: Factors, vectors: int, height: int, q: Value) -> list[list[Value]]:
    """Rows of queries, of so many vectors each, from the address of the first one."""
    load = v.load_pairs if factors.together == 2 else v.load
    return [[load(q, (w * height + r) * v.bytes) for w in range(vectors)] for r in range(height)]


def _dots_of_whole(v: Vectors, factors: Factors, queries: list[list[Value]], row: Value, _: list[Value]) -> list[Value]:
    """Vectors of partial sums, of a row of K with query rows that are in registers."""
    vectors, sums = len(queries[0]), [factors.zero] * len(queries)
    length = v.index(vectors * factors.together * v.lanes)
    for w, key in enumerate(_elements(v, factors, row, v.index(0), length, vectors)):
        sums = [factors.multiply(key, query[w], total) for query, total in zip(queries, sums, strict=True)]
    return sums


def _dots_beside(
    v: Vectors, factors: Factors, rows: list[Value], later: list[Value], height: int, held: Value, D: Value, q: Value
) -> list[Value]:
    """Vectors of partial sums, of each of a few rows of K with every row of q; those of `later` are asked for."""
    stored, two, multiply = v.pointees["k"], factors.together == 2, factors.multiply
    lanes = factors.together * v.lanes

    def columns(d: Value, sums: list[Value], vectors: int) -> list[Value]:
        return add_products(d, [_elements(v, factors, row, d, D, vectors) for row in rows], sums)

    def half(d: Value, sums: list[Value]) -> list[Value]:
        """A last vector of so many words as there are lanes, and zeros."""
        words = (narrow.load_words(v, row, d, D, v.lanes, v.lanes, stored)[0] for row in rows)
        return add_products(d, [[v.shuffle(x, ir.Constant(x.type, None), range(lanes))] for x in words], sums)

    def add_products(d: Value, of_rows: list[list[Value]], sums: list[Value]) -> list[Value]:
        of_queries = _queries(v, factors, len(of_rows[0]), height, v.at(q, v.mul_index(d, height * factors.size)))
        for keys, queries in zip(zip(*of_rows, strict=True), zip(*of_queries, strict=True), strict=True):
            pairs = ((key, query) for key in keys for query in queries)
            sums = [multiply(key, query, total) for (key, query), total in zip(pairs, sums, strict=True)]
        return sums

    line, row_by_row = max(1, LINE // (lanes * BYTES[stored])), WHOLE_ROWS and len(rows) > 1
    for row in later if row_by_row else []:
        v.loop(0, v.mul_index(held, BYTES[stored]), LINE, [], partial(_ask, v, row), rolled=True)
    of_fours = stored == narrow.INT4
    at_once = TOGETHER // lanes if of_fours else max(line, min(UNROLLED // height, COLUMNS // lanes))

    def some(d: Value, sums: list[Value], vectors: int) -> list[Value]:
        together = vectors if of_fours else 1
        for i in range(0, vectors, together):
            here = v.add_index(d, i * lanes)
            if i % line == 0 and not row_by_row:
                for row in later:
                    v.prefetch(row, v.mul_index(here, BYTES[stored]))
            sums = columns(here, sums, together)
        return sums

    whole = v.whole_steps(v.index(0), held, at_once * lanes)
    sums = [factors.zero] * (len(rows) * height)
    sums = v.loop(0, whole, at_once * lanes, sums, partial(some, vectors=at_once), rolled=True)
    end = v.whole_steps(whole, held, lanes)
    sums = v.loop(whole, end, lanes, sums, partial(some, vectors=1), rolled=True)
    return v.loop(end, held, lanes, sums, half, rolled=True) if two and BYTES[stored] == 2 else sums


def _ask(v: Vectors, row: Value, at: Value, _: list[Value]) -> list[Value]:
    """Ask for a line of a row."""
    v.prefetch(row, at)
    return []


def _sums_across(v: Vectors, vectors: list[Value], add: Callable[[Value, Value], Value]) -> Value:
    """Lane i is the sum of the lanes of vector i, of as many as there are lanes."""
    step = v.lanes // 2
    while step:
        # Of each two, the lanes that stay where they are, for which no shuffle is needed, and those that change places.
        own = [lane + v.lanes if lane & step else lane for lane in range(v.lanes)]
        other = [(lane ^ step) + v.lanes if lane & step else lane ^ step for lane in range(v.lanes)]
        halves = zip(vectors[:step], vectors[step:], strict=True)
        vectors = [add(v.shuffle(x, y, own), v.shuffle(x, y, other)) for x, y in halves]
        step //= 2
    return vectors[0]


def _beside(v, height, q, D, kept):
    """Vectors of the rows of q (height, D) beside each other, in place: the first of each row, then the second of each.

    A constant apart, they need no registers for their addresses.  `kept` has room for as many.
    """
    vectors = v.builder.sdiv(v.mul_index(D, factors_of(v, "q").size), v.index(v.bytes))

    def move(i: Value) -> None:
        v.store(v.load(q, v.mul_index(i, v.bytes)), kept, v.mul_index(i, v.bytes))

    def rows(r: Value) -> None:
        def row(w: Value) -> None:
            x = v.load(kept, v.mul_index(v.add_index(v.mul_index(r, vectors), w), v.bytes))
            v.store(x, q, v.mul_index(v.add_index(v.mul_index(w, height), r), v.bytes))

        v.each(vectors, row)

    v.each(v.mul_index(vectors, height), move)
    v.each(height, rows)


dots = emits(_dots, apart=True)
beside = emits(_beside)
