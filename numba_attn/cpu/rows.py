"""The stages of attention for few query rows, as kernels whose vectors lie along the head: memory is read in order.

With a row or a few to a key, the two products are not what takes time, but reading K and V.  So both are read in whole
rows, once for all query rows of a group, and asked for ahead of their use; each row of Q, and of the output, is
contiguous.  Scores are a tile (n keys, 1 vector) with a query row in each lane, as in `tiles`, whose softmax, masks and
user functions are used as they are.
"""

from __future__ import annotations

from functools import partial

from numba import types

from numba_attn.cpu import narrow
from numba_attn.cpu.simd import BYTES, Value, Vectors, emits
from numba_attn.cpu.tiles import INFINITY, for_rows

# Bytes of K or V that are asked for before they are needed: less comes too late, more pushes out what is still to come.
AHEAD = 32 * 1024
# Rows that are read side by side: in the order of memory but for that, which hardware foresees.
BESIDE = 2
# Output rows and vectors of each that are accumulated at once, in registers.
HEIGHTS, WIDTHS = (2, 1), (8, 4, 2, 1)


def powers_of_two(lanes: int) -> list[int]:
    return [1 << i for i in range(lanes.bit_length())]


def _ahead(v: Vectors, row: Value, columns: Value, stored: types.Type) -> Value:
    """How far ahead memory is asked for, in bytes: whole rows; one byte more, as there may be no columns."""
    return v.mul_index(row, v.builder.sdiv(v.index(AHEAD), v.add_index(v.mul_index(columns, BYTES[stored]), 1)))


def _dots(v, height, k, k_row, n, D, q, s):
    """s (n, 1 vector) = k (n, D).q (height, D) for a height that is a power of two; 0 in the other lanes.

    D is whole vectors.  Rows of s up to a multiple of the lanes are written.
    """
    v.choose(height, {rows: partial(_dots_of, v, rows, k, k_row, n, D, q, s) for rows in powers_of_two(v.lanes)})


def _dots_of(v: Vectors, height: int, k: Value, k_row: Value, n: Value, D: Value, q: Value, s: Value) -> None:
    stored = v.pointees["k"]
    keys, last = v.lanes // height, v.add_index(n, -1)
    ahead = _ahead(v, k_row, D, stored)

    def step(j: Value, _: list[Value]) -> list[Value]:
        rows = [v.at(k, v.mul_index(v.least(v.add_index(j, i), last), k_row)) for i in range(keys)]
        sums = []
        for first in range(0, keys, BESIDE):
            sums += _dots_beside(v, rows[first : first + BESIDE], height, ahead, D, q)
        totals = _sums_across(v, sums)
        for i in range(keys):
            lanes = [i * height + r for r in range(height)] + [v.lanes] * (v.lanes - height)
            v.store(v.shuffle(totals, v.constant(0.0), lanes), v.at(s, v.mul_index(v.add_index(j, i), v.bytes)))
        return []

    v.loop(0, n, keys, [], step)


def _dots_beside(v: Vectors, rows: list[Value], height: int, ahead: Value, D: Value, q: Value) -> list[Value]:
    """Vectors of partial sums, of each of a few rows of K with every row of q."""
    stored = v.pointees["k"]
    q_row = v.mul_index(D, v.size)

    def columns(d: Value, sums: list[Value]) -> list[Value]:
        here = v.mul_index(d, BYTES[stored])
        for row in rows:
            v.prefetch(row, v.add_index(here, ahead))
        keys = [narrow.load(v, row, here, stored) for row in rows]
        queries = [v.load(v.at(q, v.mul_index(q_row, r)), v.mul_index(d, v.size)) for r in range(height)]
        return [
            v.fma(key, query, sums[i * height + r]) for i, key in enumerate(keys) for r, query in enumerate(queries)
        ]

    return v.loop(0, D, v.lanes, [v.constant(0.0)] * (len(rows) * height), columns)


def _sums_across(v: Vectors, vectors: list[Value]) -> Value:
    """Lane i is the sum of the lanes of vector i, of as many as there are lanes."""
    step = v.lanes // 2
    while step:
        low = [lane if not lane & step else v.lanes + lane - step for lane in range(v.lanes)]
        high = [lane + step if not lane & step else v.lanes + lane for lane in range(v.lanes)]
        halves = zip(vectors[:step], vectors[step:], strict=True)
        vectors = [v.add(v.shuffle(x, y, low), v.shuffle(x, y, high)) for x, y in halves]
        step //= 2
    return vectors[0]


def _mix(v, rows, value, value_row, Dv, n, p, o):
    """o (rows, Dv) += p.T (rows, n) @ value (n, Dv), where p is (n, 1 vector) and Dv is whole vectors."""
    stored = v.pointees["value"]
    ahead = _ahead(v, value_row, Dv, stored)

    def some(first: Value, height: int) -> None:
        def block(vector: Value, width: int) -> None:
            column = v.mul_index(vector, v.lanes)
            outs = [v.at(o, v.mul_index(v.add_index(v.mul_index(v.add_index(first, r), Dv), column), v.size))
                    for r in range(height)]  # fmt: skip
            start = v.at(value, v.mul_index(column, BYTES[stored]))
            weights = v.at(p, v.mul_index(first, v.size))

            def key(j: Value, carried: list[Value]) -> list[Value]:
                row, weight, *acc = carried
                for w in range(0, width, max(1, 64 // (v.lanes * BYTES[stored]))):
                    v.prefetch(row, v.add_index(ahead, w * v.lanes * BYTES[stored]))
                factors = [v.splat(v.load_scalar(weight, r * v.size)) for r in range(height)]
                values = [narrow.load(v, row, w * v.lanes * BYTES[stored], stored) for w in range(width)]
                acc = [v.fma(values[w], factors[r], acc[r * width + w]) for r in range(height) for w in range(width)]
                return [v.at(row, value_row), v.at(weight, v.bytes), *acc]

            zero = [v.constant(0.0)] * (height * width)
            acc = v.loop(0, n, 1, [start, weights, *zero], key, rolled=True)[2:]
            for r in range(height):
                for w in range(width):
                    total = v.add(v.load(outs[r], w * v.bytes), acc[r * width + w])
                    v.store(total, outs[r], w * v.bytes)

        for_rows(v, v.builder.sdiv(Dv, v.index(v.lanes)), WIDTHS, block)

    for_rows(v, rows, HEIGHTS, some)


def _mix_carefully(v, rows, value, value_row, Dv, n, p, o):
    """The same bits, except that the values of masked keys (p = -0.0) are not used even where they are not finite."""
    stored, b = v.pointees["value"], v.builder
    masked = b.bitcast(v.constant(-0.0), v.bits)

    def outputs(row: Value, column: Value) -> None:
        at = v.at(o, v.mul_index(v.add_index(v.mul_index(row, Dv), column), v.size))

        def key(j: Value, acc: list[Value]) -> list[Value]:
            weight = v.splat(v.load_scalar(v.at(p, v.mul_index(j, v.bytes)), v.mul_index(row, v.size)))
            x = narrow.load(v, v.at(value, v.mul_index(j, value_row)), v.mul_index(column, BYTES[stored]), stored)
            x = v.select(b.icmp_signed("==", b.bitcast(weight, v.bits), masked), v.constant(0.0), x)
            return [v.fma(x, weight, acc[0])]

        v.store(v.add(v.load(at), v.loop(0, n, 1, [v.constant(0.0)], key)[0]), at)

    def some(row: Value) -> None:
        def columns(column: Value, _: list[Value]) -> list[Value]:
            outputs(row, column)
            return []

        v.loop(0, Dv, v.lanes, [], columns)

    v.each(rows, some)


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
    """factors = gain / total of a state, 0 for a query that attends to nothing."""
    total = v.load(state, v.bytes)
    zero = v.constant(0.0)
    v.store(v.select(v.equal(total, zero), zero, v.div(v.splat(gain), total)), factors)


dots = emits(_dots)
mix = emits(_mix)
mix_carefully = emits(_mix_carefully)
weigh_rows = emits(_weigh_rows, returns=types.boolean)
add_rows = emits(_add_rows)
join = emits(_join)
shares = emits(_shares)
