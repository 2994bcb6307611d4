"""The stages of attention for few query rows, as kernels whose vectors lie along the head: memory is read in order.

With a row or a few to a key, the two products are not what takes time, but reading K and V.  So both are read in whole
rows, once for all query rows of a group, and asked for ahead of their use where that helps: K in `dots`, V here.  Each
row of Q, and of the output, is contiguous.  How rows of K and V follow each other is in `walk`.

Scores are a tile of vectors, one key after the other, the query rows of each in `stride` lanes: a power of two, so that
with fewer rows than lanes a vector has several keys, and none of its exponentials is wasted.  The stages of `softmax`
do such a tile as it is, if what it keeps for each row, in all lanes of the row, is made the same in all of them.
With as many lanes as a vector has, it is a tile (n keys, 1 vector) of `tiles`, for what has to know where rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from numba import types

from numba_attn.cpu import narrow
from numba_attn.cpu.as_read import mix_one
from numba_attn.cpu.blocks import INFINITY, for_rows, for_widths
from numba_attn.cpu.factors import across, factors_of, powers_of_two, widened
from numba_attn.cpu.simd import BYTES, I32, WORDS, Value, Vectors, emits
from numba_attn.cpu.softmax import share
from numba_attn.cpu.target import MANY_REGISTERS
from numba_attn.cpu.tiles import are_pairs
from numba_attn.cpu.walk import ALONE, FEW_OF_VALUES, FEW_QUANTIZED, Ahead, Walk, row_at

# Output rows, and vectors of each, that are accumulated at once: as many as registers hold with what is multiplied.
# So many rows that values are read once.  One row has vectors for 128 numbers, so that those are read in order, even if
# a sum or two are then in memory, where there are 16 registers.
OUTPUTS = (
    {8: (2, 1), 4: (4, 2, 1), 2: (8, 4, 2, 1), 1: (8, 4, 2, 1)}
    if MANY_REGISTERS
    else {4: (3, 2, 1), 2: (6, 4, 2, 1), 1: (16, 8, 4, 2, 1)}
)


NEAR = 16 * 1024  # bytes of values at once, which all query rows find in the first-level cache


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


def _near(v: Vectors, n: Value, Dv: Value, body: Callable[[Value, Value], object]) -> None:
    """`body(first, end)` for so few of n keys at once, an even number, that their values stay in the nearest cache."""
    two = v.mul_index(v.add_index(v.mul_index(Dv, BYTES[v.pointees["value"]]), 1), 2)  # bytes of two rows, at least 1
    some = v.mul_index(v.add_index(v.builder.sdiv(v.index(NEAR), two), 1), 2)

    def keys(first: Value, _: list[Value]) -> list[Value]:
        body(first, v.least(v.add_index(first, some), n))
        return []

    v.loop(0, n, some, [], keys)


def _mix(v, rows, value, offsets, ahead, row, until, page, Dv, n, p, stride, step, o):
    """o (rows, Dv) += p.T (rows, n) @ value (n, Dv), where p is (n, stride), as `factors.weights_of` leaves it.

    Dv is whole vectors.  Rows of the value are as those of k in `dots`; what is `ahead` is asked for once, whatever
    the number of rows.
    """
    stored, p_row, factors = v.pointees["value"], v.mul_index(stride, v.size), factors_of(v, "p")
    walk, vectors = Walk(value, offsets, n, row, until, page), v.builder.sdiv(Dv, v.index(v.lanes))
    at_once, words, multiply = factors.together, v.pointees["p"] == WORDS, factors.multiply

    def widths_of(height: int) -> list[int]:
        """Of integers, and of two keys side by side, so many vectors as `narrow` makes of them."""
        plain = at_once == 1 and BYTES[stored] > 1
        return [width for width in OUTPUTS[height] if plain or width in (8, 4, 2, 1)]

    def ahead_of(asked: bool) -> Ahead:
        return Ahead(value, offsets, vectors, v.lanes * BYTES[stored], asked)

    def some(begin: Value, end: Value, first: Value, height: int, asked: bool) -> None:
        rows_on = v.builder.select(v.builder.icmp_signed("==", first, v.index(0)), ahead, v.index(0))
        later = ahead_of(asked)

        def block(vector: Value, width: int) -> None:
            column = v.mul_index(vector, v.lanes)
            outs = [v.at(o, v.mul_index(v.add_index(v.mul_index(v.add_index(first, r), Dv), column), v.size))
                    for r in range(height)]  # fmt: skip
            at = v.half(begin) if at_once == 2 else begin
            p_here = v.at(v.at(p, v.mul_index(at, p_row)), v.mul_index(first, v.size))
            # The columns before these have asked for as many vectors as they have.
            next_one = later.begin(v, v.add_index(begin, rows_on), v.mul_index(vector, v.builder.sub(end, begin)))
            sums_from = 3 + len(next_one)

            def keys(j: Value, carried: list[Value]) -> list[Value]:
                weight, at, next_one, acc, key_rows = (
                    carried[0], carried[1:3], carried[3:sums_from], carried[sums_from:], [],
                )  # fmt: skip
                for i in range(at_once):
                    key_rows.append(at[0])
                    at = walk.follow(v, at, v.add_index(j, i + 1))
                    next_one = later.ask(v, next_one, width)
                weights = [v.load_scalar(weight, r * v.size, I32 if at_once == 2 else None) for r in range(height)]
                if at_once == 2:
                    values = narrow.load_side_by_side(
                        v, key_rows[0], key_rows[1], column, Dv, width, stored, in_order=False
                    )
                else:
                    values = widened(v, key_rows[0], column, Dv, stored, width)
                    if BYTES[stored] == 1:
                        scale = narrow.load_scale(v, key_rows[0], Dv, stored)
                        weights = [v.builder.fmul(x, scale) for x in weights]
                weights = [v.splat(x) for x in weights]
                acc = [multiply(values[w], weights[r], acc[r * width + w]) for r in range(height) for w in range(width)]
                return [v.at(weight, p_row), *at, *next_one, *acc]

            start = [p_here, *walk.begin(v, begin), *next_one, *[factors.zero] * (height * width)]
            acc = v.loop(begin, end, at_once, start, keys, rolled=True)[sums_from:]
            for r in range(height):
                steps = v.splat(v.load_scalar(step, v.mul_index(v.add_index(first, r), v.size))) if words else None
                sums = [factors.as_numbers(x) for x in acc[r * width : (r + 1) * width]]
                for w, more in enumerate(narrow.in_order(v, sums) if at_once == 2 else sums):
                    total = v.load(outs[r], w * v.bytes)
                    total = v.fma(more, steps, total) if words else v.add(total, more)
                    v.store(total, outs[r], w * v.bytes)

        for_widths(v, vectors, widths_of(height), block)

    def in_rows(heights: list[int], asked: bool) -> None:
        _near(v, n, Dv, lambda begin, end: for_rows(v, rows, heights, partial(some, begin, end, asked=asked)))

    def one_row(asked: bool) -> None:
        def block(vector: Value, width: int) -> None:
            out = v.at(o, v.mul_index(vector, v.bytes))
            mix_one(v, factors, walk, ahead_of(asked), ahead, vector, width, Dv, p, p_row, out)

        for_rows(v, vectors, widths_of(1), block)

    few = FEW_QUANTIZED if words else FEW_OF_VALUES
    form, forms = v.index(0), {0: partial(in_rows, [*OUTPUTS], True)}
    is_few = v.builder.icmp_signed("<=", rows, v.index(few))
    if words:
        form, forms[1] = v.builder.select(is_few, v.index(1), form), partial(one_row, True)
    if ALONE:
        alone = v.builder.and_(is_few, v.builder.icmp_signed("==", ahead, v.index(0)))
        form = v.builder.select(alone, v.index(2), form)
        forms[2] = partial(one_row, False) if words else partial(in_rows, [h for h in OUTPUTS if h <= few], False)
    v.choose(form, forms)


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


spread = emits(_spread)
gather = emits(_gather)
add_across = emits(_add_across)
highest_across = emits(_highest_across)
mix = emits(_mix, apart=True)
mix_carefully = emits(_mix_carefully)
weigh_rows = emits(_weigh_rows, returns=types.boolean)
add_rows = emits(_add_rows)
join = emits(_join)
shares = emits(_shares)
