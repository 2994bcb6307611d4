"""The stages of attention for few query rows, as kernels whose vectors lie along the head: memory is read in order.

With a row or a few to a key, the two products are not what takes time, but reading K and V.  So both are read in whole
rows, once for all query rows of a group, and asked for ahead of their use where that helps: K in `dots`, V in
`mixing`.  Each row of the output is contiguous.  How rows of K and V follow each other is in `walk`.

Scores are a tile of vectors, one key after the other, the query rows of each in `stride` lanes: a power of two, so that
with fewer rows than lanes a vector has several keys, and none of its exponentials is wasted.  The stages of `softmax`
do such a tile as it is, if what it keeps for each row, in all lanes of the row, is made the same in all of them.
What is added to scores is a tile of the same form.  With as many lanes as a vector has, for dropout, which has to know
where rows are, it is a tile (n keys, 1 vector) of `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from numba import types

from numba_attn.cpu.elementary import exp2
from numba_attn.cpu.emits import emits
from numba_attn.cpu.factors import across, powers_of_two
from numba_attn.cpu.simd import Value, Vectors
from numba_attn.cpu.softmax import share


def _spread(v, n, height, s):
    """s (n, height) as (n, 1 vector), in place; what is in the other lanes means nothing."""

    def key(i: Value, _: list[Value]) -> list[Value]:
        j = v.builder.sub(v.add_index(n, -1), i)  # from the last one: nothing is overwritten that is still to be read
        v.store(v.load(s, v.mul_index(v.mul_index(j, height), v.size)), s, v.mul_index(j, v.bytes))
        return []

    v.loop(0, n, 1, [], key)


def across_keys(v: Vectors, stride: Value, at: Value, combine: Callable[[Value, Value], Value]) -> None:
    """Combine the lanes of each query row of a vector in memory: the same result in all of them."""

    def of_rows(height: int) -> None:
        v.store(across(v, v.load(at), height, combine), at)

    v.choose(stride, {rows: partial(of_rows, rows) for rows in powers_of_two(v.lanes)})


def _add_across(v, stride, sums):
    across_keys(v, stride, sums, v.add)


def _highest_across(v, stride, top):
    across_keys(v, stride, top, v.maximum)


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


def _shares(v, state, gain, factors):
    """factors = gain / total of a state."""
    v.store(share(v, v.load(state, v.bytes), gain), factors)


def _copy(v, vector, to):
    v.store(v.load(vector), to)


def _parts(v, state, of_split, factors):
    """factors = what probabilities against a split's reference are to be multiplied by, to be those of all keys."""
    step = v.sub(v.load(of_split), v.load(state))
    (power,) = exp2(v, step)
    v.store(v.mul(power, share(v, v.load(state, v.bytes), v.number(1.0))), factors)


def _write_weights(v, n, stride, p, to, to_row):
    """to (n,), `to_row` bytes apart, = the first of the `stride` numbers of each key of p; 0 where masked, not -0."""
    one_by_one, zero = v.index(0), v.number(0.0)
    beside = v.builder.and_(
        v.builder.icmp_signed("==", to_row, v.index(v.size)), v.builder.icmp_signed("==", stride, v.index(1))
    )
    whole = v.builder.select(beside, v.whole_steps(one_by_one, n, v.lanes), one_by_one)

    def keys(j: Value, _: list[Value]) -> list[Value]:
        at = v.mul_index(j, v.size)
        v.store(v.add(v.load(p, at), v.constant(0.0)), to, at)
        return []

    def key(j: Value, _: list[Value]) -> list[Value]:
        x = v.load_scalar(p, v.mul_index(v.mul_index(j, stride), v.size))
        v.store(v.builder.fadd(x, zero), to, v.mul_index(j, to_row))
        return []

    v.loop(0, whole, v.lanes, [], keys)
    v.loop(whole, n, 1, [], key)


def _scale_weights(v, n, x, x_row, factor):
    """x (n,), `x_row` bytes apart, *= a factor, which may be anything where all are 0."""
    beside = v.builder.icmp_signed("==", x_row, v.index(v.size))
    whole = v.builder.select(beside, v.whole_steps(v.index(0), n, v.lanes), v.index(0))
    factors, zeros = v.splat(factor), v.constant(0.0)

    def keys(j: Value, _: list[Value]) -> list[Value]:
        at = v.mul_index(j, v.size)
        weights = v.load(x, at)
        v.store(v.select(v.equal(weights, zeros), zeros, v.mul(weights, factors)), x, at)
        return []

    def key(j: Value, _: list[Value]) -> list[Value]:
        at, zero, b = v.mul_index(j, x_row), v.number(0.0), v.builder
        weight = v.load_scalar(x, at)
        v.store(b.select(b.fcmp_ordered("==", weight, zero), zero, b.fmul(weight, factor)), x, at)
        return []

    v.loop(0, whole, v.lanes, [], keys)
    v.loop(whole, n, 1, [], key)


spread = emits(_spread)
add_across = emits(_add_across)
highest_across = emits(_highest_across)
weigh_rows = emits(_weigh_rows, returns=types.boolean)
add_rows = emits(_add_rows)
shares = emits(_shares)
copy = emits(_copy)
parts = emits(_parts)
write_weights = emits(_write_weights)
scale_weights = emits(_scale_weights)
