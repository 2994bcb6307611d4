"""The stages of attention for few query rows, as kernels whose vectors lie along the head: memory is read in order.

With a row or a few to a key, the two products are not what takes time, but reading K and V.  So both are read in whole
rows, once for all query rows of a group, and asked for ahead of their use; each row of Q, and of the output, is
contiguous.  Where the rows of K and V are is in tables of their offsets, so that pages take no longer than rows one
behind the other.

Scores are a tile of vectors, one key after the other, the query rows of each in `stride` lanes: a power of two, so that
with fewer rows than lanes a vector has several keys, and none of its exponentials is wasted.  The softmax of `tiles`
does such a tile as it is, if what it keeps for each row, in all lanes of the row, is made the same in all of them.
With as many lanes as a vector has, it is a tile (n keys, 1 vector) of `tiles`, for what has to know where rows are.

Last, the product with the values of a tile of many rows that has all their keys, which `forward` uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir
from numba import types

from numba_attn.cpu import narrow, target
from numba_attn.cpu.factors import across, factors_of, powers_of_two, row_at, scales_of
from numba_attn.cpu.simd import BYTES, I1, I32, WORDS, Value, Vectors, emits
from numba_attn.cpu.tiles import INFINITY, LINE, are_pairs, for_rows, product, share

MANY = target.ISA in ("avx512", "neon")  # registers


def beside(height: int) -> int:
    """Keys that are read side by side, for so many query rows.

    With 32 registers so few that memory is read in order but for that, as hardware foresees: one for one row where that
    is left to it.  With 16, as many as there are sums in a vector, as fewer wait for each other.
    """
    if not MANY:
        return target.VECTOR_BYTES // 4
    return 1 if height == 1 and target.PREFETCH == 2 else 2


UNROLLED = 8  # vectors of a row at once, for one query row: a loop for each takes as long as they do
COLUMNS = 128  # elements of a row at once at most, as many heads have
# Output rows, and vectors of each, that are accumulated at once: as many as registers hold with what is multiplied.
# So many rows that values are read once.
OUTPUTS = (
    {8: (2, 1), 4: (4, 2, 1), 2: (8, 4, 2, 1), 1: (8, 4, 2, 1)} if MANY else {4: (2, 1), 2: (4, 2, 1), 1: (8, 4, 2, 1)}
)


# Likewise for a tile of many rows: vectors of the output, and rows at once.
WHOLE = (
    {4: (6, 4, 2, 1), 2: (12, 4, 2, 1), 1: (8, 4, 2, 1)} if MANY else {2: (4, 2, 1), 1: (8, 4, 2, 1)}
)  # fmt: skip

NEAR = 16 * 1024  # bytes of values at once, which all query rows find in the first-level cache


def _dots(v, height, k, offsets, ahead, n, D, q, step, s):
    """s (n, height) = k (n, D).q (height, D) for a height that is a power of two.

    D is whole vectors of q, which is as `factors` says, of words in steps.  Whole vectors of s are written.  Rows
    `ahead` of each row are asked for.
    """
    arguments = k, offsets, ahead, n, D, q, step, s
    v.choose(height, {rows: partial(_dots_of, v, rows, *arguments) for rows in powers_of_two(v.lanes)})


def _dots_of(
    v: Vectors, height: int, k: Value, offsets: Value, ahead: Value, n: Value, D: Value, q: Value, step: Value, s: Value
) -> None:
    stored = v.pointees["k"]
    keys, at_once, last = v.lanes // height, beside(height), v.add_index(n, -1)

    def some(j: Value, _: list[Value]) -> list[Value]:
        numbers = [v.least(v.add_index(j, i), last) for i in range(keys)]
        rows = [row_at(v, k, offsets, number) for number in numbers]
        sums = []
        for first in range(0, keys, at_once):
            here = slice(first, first + at_once)
            later = [row_at(v, k, offsets, v.add_index(number, ahead)) for number in numbers[here]]
            sums += _dots_beside(v, rows[here], later, height, D, q)
        scores = _sums_across(v, sums)
        if stored == narrow.INT8:
            scales = scales_of(v, rows, D, height)
            scores = v.mul(scores, v.mul(scales, v.load(step)) if v.pointees["q"] == WORDS else scales)
        v.store(scores, v.at(s, v.mul_index(j, height * v.size)))
        return []

    v.loop(0, n, keys, [], some)


def _spread(v, n, height, s):
    """s (n, height) as (n, 1 vector), in place; what is in the other lanes means nothing."""

    def key(i: Value, _: list[Value]) -> list[Value]:
        j = v.builder.sub(v.add_index(n, -1), i)  # from the last one: nothing is overwritten that is still to be read
        v.store(v.load(s, v.mul_index(v.mul_index(j, height), v.size)), s, v.mul_index(j, v.bytes))
        return []

    v.loop(0, n, 1, [], key)


def _gather(v, n, stride, added, row, bias):
    """bias (n, stride) = the first lanes of `added` (n, 1 vector), whose vectors are `row` bytes apart; -inf behind it.

    Both may be the same memory.
    """
    step = v.mul_index(stride, v.size)

    def key(j: Value, _: list[Value]) -> list[Value]:
        v.store(v.load(added, v.mul_index(j, row)), bias, v.mul_index(j, step))
        return []

    v.loop(0, n, 1, [], key)
    v.store(v.constant(-INFINITY), bias, v.mul_index(n, step))


def across_keys(v: Vectors, stride: Value, at: Value, combine: Callable[[Value, Value], Value]) -> None:
    """Combine the lanes of each query row of a vector in memory: the same result in all of them."""

    def of_rows(height: int) -> None:
        v.store(across(v, v.load(at), height, combine), at)

    v.choose(stride, {rows: partial(of_rows, rows) for rows in powers_of_two(v.lanes)})


def _add_across(v, stride, sums):
    across_keys(v, stride, sums, v.add)


def _highest_across(v, stride, top):
    across_keys(v, stride, top, v.maximum)


def _numbers(v: Vectors, row: Value, d: Value, D: Value, stored: types.Type) -> Value:
    """A vector of the elements of a row from d on; of 8-bit integers without their scale."""
    if BYTES[stored] > 1:
        return narrow.load(v, row, v.mul_index(d, BYTES[stored]), stored)
    integers = narrow.load_integers(v, row, d, stored)
    return integers if stored == narrow.INT8 else v.mul(integers, v.splat(narrow.load_scale(v, row, d, D, stored)))


def _dots_beside(v: Vectors, rows: list[Value], later: list[Value], height: int, D: Value, q: Value) -> list[Value]:
    """Vectors of partial sums, of each of a few rows of K with every row of q; as many rows are asked for `later`."""
    stored, factors = v.pointees["k"], factors_of(v, "q")
    two, multiply = factors.together == 2, factors.multiply
    lanes, load = factors.together * v.lanes, v.load_pairs if two else v.load
    q_row = v.mul_index(D, factors.size)

    def columns(d: Value, sums: list[Value]) -> list[Value]:
        keys = [narrow.load_words(v, row, d, lanes, stored) if two else _numbers(v, row, d, D, stored) for row in rows]
        queries = [load(v.at(q, v.mul_index(q_row, r)), v.mul_index(d, factors.size)) for r in range(height)]
        return [
            multiply(key, query, sums[i * height + r]) for i, key in enumerate(keys) for r, query in enumerate(queries)
        ]

    line = max(1, LINE // (lanes * BYTES[stored]))
    at_once = max(1, min(UNROLLED // height, COLUMNS // lanes))

    def some(d: Value, sums: list[Value], vectors: int) -> list[Value]:
        for i in range(vectors):
            here = v.add_index(d, i * lanes)
            if i % line == 0:
                for row in later:
                    v.prefetch(row, v.mul_index(here, BYTES[stored]))
            sums = columns(here, sums)
        return sums

    whole = v.whole_steps(v.index(0), D, at_once * lanes)
    sums = [factors.zero] * (len(rows) * height)
    sums = v.loop(0, whole, at_once * lanes, sums, partial(some, vectors=at_once), rolled=True)
    return [*map(factors.as_numbers, v.loop(whole, D, lanes, sums, partial(some, vectors=1), rolled=True))]


def _sums_across(v: Vectors, vectors: list[Value]) -> Value:
    """Lane i is the sum of the lanes of vector i, of as many as there are lanes."""
    step = v.lanes // 2
    while step:
        # Of each two, the lanes that stay where they are, for which no shuffle is needed, and those that change places.
        own = [lane + v.lanes if lane & step else lane for lane in range(v.lanes)]
        other = [(lane ^ step) + v.lanes if lane & step else lane ^ step for lane in range(v.lanes)]
        halves = zip(vectors[:step], vectors[step:], strict=True)
        vectors = [v.add(v.shuffle(x, y, own), v.shuffle(x, y, other)) for x, y in halves]
        step //= 2
    return vectors[0]


def _near(v: Vectors, n: Value, Dv: Value, body: Callable[[Value, Value], object]) -> None:
    """`body(first, end)` for so few of n keys at once, an even number, that their values stay in the nearest cache."""
    two = v.mul_index(v.add_index(v.mul_index(Dv, BYTES[v.pointees["value"]]), 1), 2)  # bytes of two rows, at least 1
    some = v.mul_index(v.add_index(v.builder.sdiv(v.index(NEAR), two), 1), 2)

    def keys(first: Value, _: list[Value]) -> list[Value]:
        body(first, v.least(v.add_index(first, some), n))
        return []

    v.loop(0, n, some, [], keys)


def _mix(v, rows, value, offsets, ahead, Dv, n, p, stride, step, o):
    """o (rows, Dv) += p.T (rows, n) @ value (n, Dv), where p is (n, stride), as `factors.weights_of` leaves it.

    Dv is whole vectors.  Rows of the value are as those of k in `_dots`; what is `ahead` is asked for once, whatever
    the number of rows.
    """
    stored, p_row, factors = v.pointees["value"], v.mul_index(stride, v.size), factors_of(v, "p")
    line = max(1, LINE // (v.lanes * BYTES[stored]))  # vectors of a cache line
    at_once, words, multiply = factors.together, v.pointees["p"] == WORDS, factors.multiply

    def some(begin: Value, end: Value, first: Value, height: int) -> None:
        rows_on = v.builder.select(v.builder.icmp_signed("==", first, v.index(0)), ahead, v.index(0))

        def block(vector: Value, width: int) -> None:
            column = v.mul_index(vector, v.lanes)
            outs = [v.at(o, v.mul_index(v.add_index(v.mul_index(v.add_index(first, r), Dv), column), v.size))
                    for r in range(height)]  # fmt: skip
            at = v.half(begin) if at_once == 2 else begin
            p_here = v.at(v.at(p, v.mul_index(at, p_row)), v.mul_index(first, v.size))

            def keys(j: Value, carried: list[Value]) -> list[Value]:
                weight, *acc = carried
                numbers = [v.least(v.add_index(j, i), v.add_index(n, -1)) if i else j for i in range(at_once)]
                key_rows = [row_at(v, value, offsets, number) for number in numbers]
                for number in numbers:
                    later = row_at(v, value, offsets, v.add_index(number, rows_on))
                    for w in range(0, width, line):
                        v.prefetch(later, v.mul_index(v.add_index(column, w * v.lanes), BYTES[stored]))
                weights = [v.load_scalar(weight, r * v.size, I32 if at_once == 2 else None) for r in range(height)]
                row = key_rows[0]
                if at_once == 2:
                    values = narrow.load_side_by_side(v, row, key_rows[1], column, width, stored, in_order=False)
                else:
                    values = [_numbers(v, row, v.add_index(column, w * v.lanes), Dv, stored) for w in range(width)]
                    if stored == narrow.INT8:
                        scale = narrow.load_scale(v, row, v.index(0), Dv, stored)
                        weights = [v.builder.fmul(x, scale) for x in weights]
                weights = [v.splat(x) for x in weights]
                acc = [multiply(values[w], weights[r], acc[r * width + w]) for r in range(height) for w in range(width)]
                return [v.at(weight, p_row), *acc]

            acc = v.loop(begin, end, at_once, [p_here, *[factors.zero] * (height * width)], keys, rolled=True)[1:]
            for r in range(height):
                steps = v.splat(v.load_scalar(step, v.mul_index(v.add_index(first, r), v.size))) if words else None
                sums = [factors.as_numbers(x) for x in acc[r * width : (r + 1) * width]]
                for w, more in enumerate(narrow.in_order(v, sums) if at_once == 2 else sums):
                    total = v.load(outs[r], w * v.bytes)
                    total = v.fma(more, steps, total) if words else v.add(total, more)
                    v.store(total, outs[r], w * v.bytes)

        for_rows(v, v.builder.sdiv(Dv, v.index(v.lanes)), OUTPUTS[height], block)

    _near(v, n, Dv, lambda begin, end: for_rows(v, rows, [*OUTPUTS], partial(some, begin, end)))


def _mix_carefully(v, rows, value, offsets, Dv, n, p, stride, step, o):
    """The same bits, except that the values of masked keys (p = -0.0) are not used even where they are not finite."""
    if v.pointees["p"] == WORDS:  # integers are finite, and no scale of a masked key is in the words
        _mix(v, rows, value, offsets, v.index(0), Dv, n, p, stride, step, o)
        return
    stored, b, p_row, pairs = v.pointees["value"], v.builder, v.mul_index(stride, v.size), are_pairs(v, "p")
    masked, zero = b.bitcast(v.constant(-0.0), v.bits), v.constant(0.0)

    def key(row: Value, column: Value, j: Value, acc: list[Value]) -> list[Value]:
        number = v.load_scalar(v.at(p, v.mul_index(j, p_row)), v.mul_index(row, v.size))
        of_key = row_at(v, value, offsets, j)
        x, weight = _numbers(v, of_key, column, Dv, stored), v.splat(number)
        is_masked = b.icmp_signed("==", b.bitcast(weight, v.bits), masked)
        if stored == narrow.INT8:
            weight = v.splat(b.fmul(number, narrow.load_scale(v, of_key, v.index(0), Dv, stored)))
        # A scale may be what is not finite, and is in the weight then.
        x, weight = v.select(is_masked, zero, x), v.select(is_masked, zero, weight)
        return [v.fma(x, weight, acc[0])]

    def two_keys(row: Value, column: Value, j: Value, acc: list[Value]) -> list[Value]:
        weight = v.load_scalar(v.at(p, v.mul_index(v.half(j), p_row)), v.mul_index(row, v.size), I32)
        low, high = (row_at(v, value, offsets, v.least(v.add_index(j, i), v.add_index(n, -1))) for i in range(2))
        (x,) = narrow.load_side_by_side(v, low, high, column, 1, stored)
        for half, negative_zero in ((0xFFFF, 0x8000), (0xFFFF0000, 0x80000000)):
            is_masked = b.icmp_unsigned("==", b.and_(weight, I32(half)), I32(negative_zero))
            x = b.and_(x, v.splat(b.select(is_masked, I32(0xFFFFFFFF ^ half), I32(0xFFFFFFFF))))
        return [v.dot(x, v.splat(weight), acc[0])]

    step, at_once = (two_keys, 2) if pairs else (key, 1)

    def columns(begin: Value, end: Value, row: Value) -> None:
        def some(column: Value, _: list[Value]) -> list[Value]:
            at = v.at(o, v.mul_index(v.add_index(v.mul_index(row, Dv), column), v.size))
            v.store(v.add(v.load(at), v.loop(begin, end, at_once, [zero], partial(step, row, column))[0]), at)
            return []

        v.loop(0, Dv, v.lanes, [], some)

    _near(v, n, Dv, lambda begin, end: v.each(rows, partial(columns, begin, end)))


def _weigh_rows(v, rows, o, Dv, factors):
    """o (rows, Dv) *= factors (1 vector); returns 0, or NaN where a result is not finite."""

    def row(r: Value, check: list[Value]) -> list[Value]:
        factor = v.splat(v.load_scalar(factors, v.mul_index(r, v.size)))

        def column(d: Value, check: list[Value]) -> list[Value]:
            at = v.at(o, v.mul_index(v.add_index(v.mul_index(r, Dv), d), v.size))
            result = v.mul(v.load(at), factor)
            v.store(result, at)
            return [v.fma(result, v.constant(0.0), check[0])]

        return v.loop(0, Dv, v.lanes, check, column)

    (check,) = v.loop(0, rows, 1, [v.constant(0.0)], row)
    return v.any(v.builder.fcmp_unordered("uno", check, check))


def _write_products(v, width, rows, value, value_row, Dv, n, p, total, gain, factors, out, out_row):
    """out (rows, Dv) = p.T @ value (n, Dv) * gain / total, of a tile p (n, width vectors) with all keys of the rows.

    These are the bits of `tiles.accumulate` and `pack.write_rows`, but nothing is transposed, and rows that fill no
    vector take no longer than they must.  Rows of the value and of the result are contiguous, and Dv is whole vectors.
    `factors` has room for a vector more than those of the queries.  Returns whether some result is not finite.
    """
    if are_pairs(v, "value"):
        return ir.Constant(I1, 0)
    stored, row, zero = v.pointees["out"], v.mul_index(width, v.bytes), v.constant(0.0)

    def factor(w: Value, check: list[Value]) -> list[Value]:
        here = v.mul_index(w, v.bytes)
        sums = v.load(total, here)
        v.store(share(v, sums, gain), factors, here)
        return [v.fma(sums, zero, check[0])]

    v.store(v.loop(0, width, 1, [zero], factor)[0], factors, row)

    def columns(first: Value, vectors: int) -> None:
        values, to = v.at(value, v.mul_index(first, v.bytes)), v.at(out, v.mul_index(first, v.lanes * BYTES[stored]))

        def some(i: Value, height: int) -> None:
            at = v.mul_index(i, v.size)
            acc = product(v, v.at(p, at), v.index(v.size), row, values, n, height, vectors, b_row=value_row)
            check = v.load(factors, row)
            for r in range(height):
                weight = v.splat(v.load_scalar(factors, v.add_index(at, r * v.size)))
                line = v.at(to, v.mul_index(out_row, v.add_index(i, r)))
                for x in range(vectors):
                    result = v.mul(v.add(zero, acc[r * vectors + x]), weight)  # from 0, where sums over tiles begin
                    check = v.fma(result, zero, check)
                    narrow.store(v, result, line, x * v.lanes * BYTES[stored], stored)
            v.store(check, factors, row)

        for_rows(v, rows, WHOLE[vectors], some)

    for_rows(v, v.builder.sdiv(Dv, v.index(v.lanes)), [*WHOLE], columns)
    check = v.load(factors, row)
    return v.any(v.builder.fcmp_unordered("uno", check, check))


def _add_rows(v, rows, o, Dv, kept, other, factors):
    """o (rows, Dv) = kept * o + factors * other (rows, Dv), with a factor in each lane of kept and factors."""

    def row(r: Value) -> None:
        keep, factor = (v.splat(v.load_scalar(x, v.mul_index(r, v.size))) for x in (kept, factors))

        def column(d: Value, _: list[Value]) -> list[Value]:
            here = v.mul_index(v.add_index(v.mul_index(r, Dv), d), v.size)
            v.store(v.fma(v.load(other, here), factor, v.mul(v.load(o, here), keep)), o, here)
            return []

        v.loop(0, Dv, v.lanes, [], column)

    v.each(rows, row)


def _join(v, state, other, kept, factors):
    """Take the sums of other keys into those so far: two states (reference, total, moment, best), a vector each.

    kept and factors are by what outputs so far, and those of the other keys, are to be multiplied.
    """
    zero, lowest = v.constant(0.0), v.constant(-INFINITY)
    names = [i * v.bytes for i in range(4)]
    (reference, total, moment, best), (reference_2, total_2, moment_2, best_2) = (
        [v.load(x, at) for at in names] for x in (state, other)
    )
    # Where there was no key, there is nothing to weigh, and the reference means nothing.
    none, none_2 = v.equal(total, zero), v.equal(total_2, zero)
    new = v.maximum(v.select(none, lowest, reference), v.select(none_2, lowest, reference_2))
    new = v.select(v.equal(new, lowest), reference, new)
    steps = v.select(none, zero, v.sub(reference, new)), v.select(none_2, zero, v.sub(reference_2, new))
    keep, factor = v.exp2(*steps)

    def moved(step: Value, total: Value, moment: Value, by: Value) -> Value:
        # Where nothing is left, the step may be beyond what a product of it can be.
        return v.select(v.equal(by, zero), zero, v.mul(v.fma(step, total, moment), by))

    moments = v.add(moved(steps[0], total, moment, keep), moved(steps[1], total_2, moment_2, factor))
    total = v.fma(total_2, factor, v.mul(total, keep))
    for x, at in zip((new, total, moments, v.maximum(best_2, best)), names, strict=True):
        v.store(x, state, at)
    v.store(keep, kept)
    v.store(factor, factors)


def _shares(v, state, gain, factors):
    """factors = gain / total of a state."""
    v.store(share(v, v.load(state, v.bytes), gain), factors)


dots = emits(_dots)
spread = emits(_spread)
gather = emits(_gather)
add_across = emits(_add_across)
highest_across = emits(_highest_across)
mix = emits(_mix)
mix_carefully = emits(_mix_carefully)
weigh_rows = emits(_weigh_rows, returns=types.boolean)
write_products = emits(_write_products, returns=types.boolean)
add_rows = emits(_add_rows)
join = emits(_join)
shares = emits(_shares)
