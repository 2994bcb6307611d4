"""K.Q of a few query rows, where vectors lie along the head and keys are read in order, see `rows`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir

from numba_attn.cpu import narrow, target
from numba_attn.cpu.blocks import LINE
from numba_attn.cpu.factors import Factors, factors_of, powers_of_two, row_at, scales_of, widened
from numba_attn.cpu.simd import BYTES, WORDS, Value, Vectors, emits
from numba_attn.storage import TOGETHER


def beside(height: int) -> int:
    """Keys that are read side by side, for so many query rows.

    With 32 registers so few that memory is read in order but for that, as hardware foresees: one for one row where that
    is left to it.  With 16, as many as there are sums in a vector, as fewer wait for each other.
    """
    if not target.MANY_REGISTERS:
        return target.VECTOR_BYTES // 4
    return 1 if height == 1 and target.PREFETCH == 2 else 2


UNROLLED = 8  # vectors of a row at once, for one query row: a loop for each takes as long as they do
COLUMNS = 128  # elements of a row at once at most, as many heads have


def _dots(v, height, k, offsets, ahead, n, held, D, q, step, s):
    """s (n, height) = k (n, held).q (height, D) for a height that is a power of two.

    D is whole vectors of q, which is as `factors` says, of words in steps.  So many elements of k are held, whole
    vectors of numbers; q is 0 beyond them.  Whole vectors of s are written.  Rows `ahead` of each row are asked for.
    """
    arguments = k, offsets, ahead, n, held, D, q, step, s
    v.choose(height, {rows: partial(_dots_of, v, rows, *arguments) for rows in powers_of_two(v.lanes)})


def _dots_of(
    v: Vectors, height: int, k: Value, offsets: Value, ahead: Value, n: Value, held: Value, D: Value, q: Value,
    step: Value, s: Value,
) -> None:  # fmt: skip
    stored = v.pointees["k"]
    keys, at_once, last, factors = v.lanes // height, beside(height), v.add_index(n, -1), factors_of(v, "q")

    def some(j: Value, _: list[Value]) -> list[Value]:
        numbers = [v.least(v.add_index(j, i), last) for i in range(keys)]
        rows = [row_at(v, k, offsets, number) for number in numbers]
        # Loaded first: with what comes last, there is nothing left to do while they are waited for.
        scales = scales_of(v, rows, D, stored, height) if BYTES[stored] == 1 else None
        sums = []
        for first in range(0, keys, at_once):
            here = slice(first, first + at_once)
            later = [row_at(v, k, offsets, v.add_index(number, ahead)) for number in numbers[here]]
            sums += _dots_beside(v, factors, rows[here], later, height, held, D, q)
        scores = factors.as_numbers(_sums_across(v, sums, factors.add))
        if scales is not None:
            scores = v.mul(scores, v.mul(scales, v.load(step)) if v.pointees["q"] == WORDS else scales)
        v.store(scores, v.at(s, v.mul_index(j, height * v.size)))
        return []

    v.loop(0, n, keys, [], some)


def _dots_beside(
    v: Vectors, factors: Factors, rows: list[Value], later: list[Value], height: int, held: Value, D: Value, q: Value
) -> list[Value]:
    """Vectors of partial sums, of each of a few rows of K with every row of q; as many rows are asked for `later`."""
    stored, two, multiply = v.pointees["k"], factors.together == 2, factors.multiply
    lanes, load = factors.together * v.lanes, v.load_pairs if two else v.load
    q_row = v.mul_index(D, factors.size)

    def columns(d: Value, sums: list[Value], vectors: int) -> list[Value]:
        if two:
            of_rows = [narrow.load_words(v, row, d, D, vectors * lanes, lanes, stored) for row in rows]
        else:
            of_rows = [widened(v, row, d, D, stored, vectors) for row in rows]
        return add_products(d, of_rows, sums)

    def half(d: Value, sums: list[Value]) -> list[Value]:
        """A last vector of so many words as there are lanes, and zeros."""
        words = (narrow.load_words(v, row, d, D, v.lanes, v.lanes, stored)[0] for row in rows)
        return add_products(d, [[v.shuffle(x, ir.Constant(x.type, None), range(lanes))] for x in words], sums)

    def add_products(d: Value, of_rows: list[list[Value]], sums: list[Value]) -> list[Value]:
        for w, keys in enumerate(zip(*of_rows, strict=True)):
            at = v.mul_index(v.add_index(d, w * lanes), factors.size)
            queries = [load(v.at(q, v.mul_index(q_row, r)), at) for r in range(height)]
            pairs = ((key, query) for key in keys for query in queries)
            sums = [multiply(key, query, total) for (key, query), total in zip(pairs, sums, strict=True)]
        return sums

    line = max(1, LINE // (lanes * BYTES[stored]))
    of_fours = stored == narrow.INT4
    at_once = TOGETHER // lanes if of_fours else max(1, min(UNROLLED // height, COLUMNS // lanes))

    def some(d: Value, sums: list[Value], vectors: int) -> list[Value]:
        together = vectors if of_fours else 1
        for i in range(0, vectors, together):
            here = v.add_index(d, i * lanes)
            if i % line == 0:
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


dots = emits(_dots)
