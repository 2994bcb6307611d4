"""P.V of one query row where values are integers: probabilities become words, see `factors`, as the values are read.

A value's scale lies behind its integers.  To know the largest of probabilities times scales beforehand, all of the
values' lines would be asked for twice, first with gaps and then in order, and hardware foresees neither.  So steps are
by the largest up to here: where a key has more, what has been summed up is put into the output, and steps start anew.
That is soon rare.
"""

from __future__ import annotations

from llvmlite import ir

from numba_attn.cpu import narrow
from numba_attn.cpu.factors import Factors, across, in_steps, most_of_values, step_of
from numba_attn.cpu.simd import I1, I16, I32, Value, Vectors
from numba_attn.cpu.walk import Ahead, Walk


def mix_one(
    v: Vectors, factors: Factors, walk: Walk, later: Ahead, ahead: Value, vector: Value, width: int, Dv: Value,
    p: Value, p_row: Value, o: Value,
) -> None:  # fmt: skip
    """o (width vectors) += p.T (1, n) @ value (n, Dv) from a vector on, for probabilities p, `p_row` bytes apart.

    As in `mixing`, of which this is one block; what is `ahead` is asked for.
    """
    # Of the four lanes, which a register of any x86 has, the first two keys', and zeros.
    b, stored, few = v.builder, v.pointees["value"], Vectors(v.builder, v.dtype, 4)
    zero, nothing, most = few.constant(0.0), [factors.zero] * width, few.constant(most_of_values(v))
    first, second, column = I32(0), I32(1), v.mul_index(vector, v.lanes)
    next_one = later.begin(v, v.index(0), ahead, v.mul_index(vector, walk.n))
    state_from = 3 + len(next_one)
    sums_from = state_from + 4

    def put(acc: list[Value], step: Value) -> None:
        steps = v.splat(b.extract_element(step, first))
        for w, more in enumerate(narrow.in_order(v, [factors.as_numbers(x) for x in acc])):
            v.store(v.fma(more, steps, v.load(o, w * v.bytes)), o, w * v.bytes)

    def two(numbers: list[Value]) -> Value:
        return b.insert_element(b.insert_element(zero, numbers[0], first), numbers[1], second)

    def keys(j: Value, carried: list[Value]) -> list[Value]:
        weight_at, at, next_one = carried[0], carried[1:3], carried[3:state_from]
        state, acc, rows = carried[state_from:sums_from], carried[sums_from:], []
        for i in range(2):
            rows.append(at[0])
            at = walk.follow(v, at, v.add_index(j, i + 1))
            next_one = later.ask(v, next_one, width)
        probabilities = two([v.load_scalar(weight_at, v.mul_index(p_row, i)) for i in range(2)])
        weights = few.mul(probabilities, two([narrow.load_scale(v, row, Dv, stored) for row in rows]))
        before, more, enough = b.block, b.append_basic_block("more"), b.append_basic_block("enough")
        top, _, step, check = state
        b.cbranch(few.any(b.fcmp_unordered(">", few.absolute(weights), top)), more, enough)
        b.position_at_end(more)
        put(acc, step)
        # The scale of a masked key, whose probability is -0.0, may be anything.
        known = few.select(few.is_negative_zero(probabilities), zero, weights)
        top = across(few, few.maximum(few.absolute(known), top), 1, few.maximum)
        check = few.fma(known, zero, check)
        changed = [known, top, *step_of(few, top, zero, most), check, *nothing]
        b.branch(enough)
        after = b.block
        b.position_at_end(enough)
        phis = [b.phi(x.type) for x in changed]
        for phi, same, other in zip(phis, [weights, *state, *acc], changed, strict=True):
            phi.add_incoming(same, before)
            phi.add_incoming(other, after)
        weights, *state = phis[:5]
        halves = b.bitcast(in_steps(few, weights, state[1]), ir.VectorType(I16, 8))
        words = v.splat(b.bitcast(v.shuffle(halves, halves, [0, 2]), I32))
        values = narrow.load_side_by_side(v, rows[0], rows[1], column, Dv, width, stored, in_order=False)
        acc = [factors.multiply(x, words, total) for x, total in zip(values, phis[5:], strict=True)]
        return [v.at(weight_at, v.mul_index(p_row, 2)), *at, *next_one, *state, *acc]

    with b.if_then(b.trunc(walk.n, I1)):  # a last key is followed by one that is masked
        v.store(b.extract_element(few.constant(-0.0), first), p, v.mul_index(p_row, walk.n))
    start = [p, *walk.begin(v, v.index(0)), *next_one, *[zero] * 4, *nothing]
    end = v.loop(0, walk.n, 2, start, keys, rolled=True)
    step, check = end[sums_from - 2 : sums_from]
    put(end[sums_from:], few.add(step, across(few, check, 1, few.add)))
