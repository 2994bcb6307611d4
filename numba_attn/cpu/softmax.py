"""The streaming softmax of a tile of stored scores, and what its epilogues in `tiles` share with it.

Scores are S (n, block) as in `tiles`, in base 2.  Each query has a reference, which is taken from its scores before
they are exponents of 2: sums are relative to it, and multiplied by what it has moved when it has to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from llvmlite import ir
from numba import types

from numba_attn.cpu.blocks import AT_ONCE, INFINITY, for_keys, for_rows, for_vectors
from numba_attn.cpu.elementary import exp2, tanh_in_place
from numba_attn.cpu.emits import emits
from numba_attn.cpu.simd import I1, I64, Value, Vectors

# A row's reference is 0 at first, and becomes the largest score so far only when that is above it by HEADROOM or below
# it by DEPTH: probabilities from 2**-32 to 2**16 lose nothing in floating point, and almost every tile can be
# exponentiated while its scores are still in registers, the first one too.
HEADROOM, DEPTH = 16.0, 32.0
COARSE, COARSE_DOUBLE = 2.0**25, 2.0**54  # scores of which the last place is 4 or more


def is_coarse(v: Vectors, x: Value) -> Value:
    """Whether the rounding of a score, or a reference, is a good part of the range of probabilities."""
    return v.less(v.constant(COARSE if v.size == 4 else COARSE_DOUBLE), v.absolute(x))


def exponent(v: Vectors, score: Value, factor: Value, extra: Value, reference: Value) -> Value:
    """score * factor + extra - reference, rounded once.

    But where products are coarse, as the reference is then, they are rounded as that was: so the largest has 0.
    """
    beside = v.sub(extra, reference)
    rounded = v.sub(v.fma(score, factor, extra), reference)
    return v.select(is_coarse(v, beside), rounded, v.fma(score, factor, beside))


def share(v: Vectors, total: Value, gain: Value) -> Value:
    """gain / total, by which outputs are multiplied, 0 for a query that attends to nothing."""
    zero = v.constant(0.0)
    return v.select(v.equal(total, zero), zero, v.div(v.splat(gain), total))


def times_log(v: Vectors, power: Value, x: Value) -> Value:
    """The power 2**x times x: 0 for a power of 0, which has an exponent of -inf."""
    zero = v.constant(0.0)
    return v.select(v.equal(power, zero), zero, v.mul(power, x))


def _out_of_range(v: Vectors, top: Value, best: Value, reference: Value) -> Value:
    """Whether a reference will not do: for a largest exponent of a tile, and the largest score with and before it."""
    low = v.less(best, v.sub(reference, v.constant(DEPTH)))
    attended = v.less(v.constant(-INFINITY), best)
    return v.builder.or_(v.less(v.constant(HEADROOM), top), v.builder.and_(low, attended))


def accept(
    v: Vectors,
    width: Value,
    top: Value,
    reference: Value,
    best: Value,
    sums: Sequence[tuple[Value, Value]],
    final: Value,
) -> Value:
    """Whether every reference will do for a tile, or it is `final` anyway; if so, best and the totals take it in."""
    end = v.mul_index(width, v.bytes)

    def highest(here: Value) -> Value:
        # Where infinities have met, the sum is NaN, which is not the maximum.
        return v.maximum(v.add(v.load(reference, here), v.load(top, here)), v.load(best, here))

    def refused(here: Value, found: list[Value]) -> list[Value]:
        out = _out_of_range(v, v.load(top, here), highest(here), v.load(reference, here))
        return [v.builder.or_(found[0], v.any(out))]

    (some_refused,) = v.loop(0, end, v.bytes, [ir.Constant(I1, 0)], refused)
    is_final = v.builder.icmp_signed("!=", final, ir.Constant(final.type, 0))
    accepted = v.builder.or_(v.builder.not_(some_refused), is_final)

    def update(here: Value) -> None:
        v.store(highest(here), best, here)
        for total, tile_sum in sums:
            v.store(v.add(v.load(total, here), v.load(tile_sum, here)), total, here)

    with v.builder.if_then(accepted):
        for_vectors(v, width, update)
    return accepted


# Stages ---------------------------------------------------------------------------------------------------------------


def _cap(v, vectors, s, scale, softcap):
    """s = tanh(scale * s / softcap)."""
    tanh_in_place(v, v.builder.fdiv(scale, softcap), s, vectors)


def _settle(v, vectors, s, scale, bias):
    """s = scale * s + the natural logarithm's form of what the bias adds; bias = what it masks, and 0 elsewhere.

    What is masked has a score of 0, so that a function meets none that nobody has given it: one with a loop may never
    end for an infinite one.
    """
    factor, lowest, natural = v.splat(scale), v.constant(-INFINITY), v.constant(math.log(2.0))
    zero = v.constant(0.0)

    def vector(here: Value) -> None:
        extra = v.load(bias, here)
        is_masked = v.equal(extra, lowest)
        # What is added may be far the larger, as ALiBi is: it is not rounded before the sum is.
        x = v.fma(extra, natural, v.mul(v.load(s, here), factor))
        v.store(v.select(is_masked, zero, x), s, here)
        v.store(v.select(is_masked, lowest, zero), bias, here)

    for_vectors(v, vectors, vector)


def _highest(v, width, s, n, scale, bias, bias_row, reference, top):
    """top = the largest of scale * s + bias - reference of each query.

    A bias of -inf masks, whatever the score is.
    """
    row = v.mul_index(width, v.bytes)
    lowest, factor = v.constant(-INFINITY), v.splat(scale)

    def vector(here: Value) -> None:
        base = v.load(reference, here)

        def keys(j: Value, height: int, highest: list[Value]) -> list[Value]:
            found = list(highest)
            for r in range(height):
                number = v.add_index(j, r)
                extra = v.load(v.at(bias, v.mul_index(number, bias_row)), here)
                x = exponent(v, v.load(v.at(s, v.mul_index(number, row)), here), factor, extra, base)
                # Where masked, x is -inf or NaN, which is not the maximum.
                found[r] = v.maximum(x, found[r])
            return found

        first, *others = for_keys(v, n, [lowest] * AT_ONCE, keys)
        for other in others:
            first = v.maximum(other, first)
        v.store(first, top, here)

    for_vectors(v, width, vector)


def _move_reference(v, width, top, reference, best, total, moment, correction):
    """Make the largest score, of a tile or so far, the reference of each query for which its own will not do.

    correction = the factor that takes old probabilities to the new reference, applied to total, and to the moment,
    the sum of p * log2(p).  Returns 0 if no correction is other than 1; 2 if a reference has become coarse, which is to
    be compared with the scores once more; and else 1.
    """
    zero = v.constant(0.0)

    def vector(here: Value, found: list[Value]) -> list[Value]:
        old, above, sums = v.load(reference, here), v.load(top, here), v.load(total, here)
        highest = v.maximum(v.add(old, above), v.load(best, here))
        moves = _out_of_range(v, above, highest, old)
        new = v.select(moves, highest, old)
        step = v.sub(old, new)
        # Downwards only where there has been no key before, and so nothing to correct.
        (factor,) = exp2(v, v.select(v.less(zero, step), zero, step))
        v.store(new, reference, here)
        v.store(factor, correction, here)
        moved = v.mul(v.fma(step, sums, v.load(moment, here)), factor)
        # Where nothing is left of the old probabilities, the step may be beyond what a product of it can be.
        v.store(v.select(v.equal(factor, zero), zero, moved), moment, here)
        v.store(v.mul(sums, factor), total, here)
        coarse = v.any(v.builder.and_(moves, is_coarse(v, new)))
        return [v.builder.or_(found[0], v.any(moves)), v.builder.or_(found[1], coarse)]

    moved = v.loop(0, v.mul_index(width, v.bytes), v.bytes, [ir.Constant(I1, 0)] * 2, vector)
    return v.add_index(*(v.builder.zext(bit, I64) for bit in moved))


def _exponentiate(
    v, width, s, n, scale, bias, bias_row, reference, best, total, sums, top, moment, moments, final, *, weighted
):  # fmt: skip
    """s = exp2(scale * s + bias - reference) in place, -0.0 where masked; total += its column sums.

    If `weighted`, moment += the column sums of p * log2(p).  top, best and the result are as those of `probabilities`,
    but for a `final` pass, with references just moved.  What still exceeds them by more than the headroom are scores so
    large that they were rounded by that much.
    """
    _powers(v, width, s, n, scale, bias, bias_row, reference, sums, top, moments, weighted=weighted)
    return _take_in(v, width, top, reference, best, total, sums, moment, moments, final, weighted=weighted)


def _take_in(v, width, top, reference, best, total, sums, moment, moments, final, *, weighted):
    """The second half of `_exponentiate`: whether references will do, and sums if they do."""
    return accept(v, width, top, reference, best, [(total, sums), (moment, moments)][: 2 if weighted else 1], final)


def _powers(v, width, s, n, scale, bias, bias_row, reference, sums, top, moments, *, weighted):
    """The first half of `_exponentiate`: sums and moments are those of the tile."""
    most = v.constant(HEADROOM)
    row = v.mul_index(width, v.bytes)
    lowest, masked, factor, zero = v.constant(-INFINITY), v.constant(-0.0), v.splat(scale), v.constant(0.0)

    def vector(here: Value) -> None:
        base = v.load(reference, here)

        def keys(j: Value, height: int, carried: list[Value]) -> list[Value]:
            highest, *tile_sums = carried
            numbers = [v.add_index(j, r) for r in range(height)]
            at = [v.at(v.at(s, v.mul_index(number, row)), here) for number in numbers]
            extra = [v.load(v.at(v.at(bias, v.mul_index(number, bias_row)), here)) for number in numbers]
            xs = [exponent(v, v.load(to), factor, e, base) for to, e in zip(at, extra, strict=True)]
            powers = exp2(v, *(at_most(v, x, most) for x in xs))
            for x, e, power, to in zip(xs, extra, powers, at, strict=True):
                kept = v.select(v.equal(e, lowest), masked, power)
                # Where masked, x is -inf or NaN, which is not the maximum.
                highest = v.maximum(x, highest)
                v.store(kept, to)
                tile_sums[0] = v.add(tile_sums[0], kept)
                if weighted:
                    tile_sums[1] = v.add(tile_sums[1], times_log(v, kept, x))
            return [highest, *tile_sums]

        start = [lowest, zero, zero][: 3 if weighted else 2]
        for result, to in zip(for_keys(v, n, start, keys), (top, sums, moments), strict=False):
            v.store(result, to, here)

    for_vectors(v, width, vector)


def _challenge(v, width, sinks, reference, top):
    """top = how far the sink of each lane is above its reference: for `move_reference`."""
    for_vectors(v, width, lambda here: v.store(v.sub(v.load(sinks, here), v.load(reference, here)), top, here))


def _add_sinks(v, width, sinks, reference, total, moment):
    """Total and moment += those of the sink of each lane."""

    def vector(here: Value) -> None:
        x = at_most(v, v.sub(v.load(sinks, here), v.load(reference, here)), v.constant(HEADROOM))
        (power,) = exp2(v, x)
        v.store(v.add(v.load(total, here), power), total, here)
        v.store(v.fma(power, x, v.load(moment, here)), moment, here)

    for_vectors(v, width, vector)


def at_most(v: Vectors, x: Value, most: Value) -> Value:
    """The smaller of x and `most`; NaN stays."""
    return v.select(v.less(most, x), most, x)


def probability(v: Vectors, x: Value, log_total: Value) -> Value:
    """The exponent of a probability, from that of what total is the sum of: not above 0, whatever rounding does."""
    return at_most(v, v.sub(x, log_total), v.constant(0.0))


def _weigh(v, width, s, n, scale, bias, bias_row, reference, log_total, sums):
    """sums (n vectors) += exp2(scale * s + bias - reference - log_total), a key's vectors added up, 0 where masked."""
    row = v.mul_index(width, v.bytes)
    lowest, factor, zero = v.constant(-INFINITY), v.splat(scale), v.constant(0.0)

    def keys(j: Value, height: int) -> None:
        def vector(w: Value, added: list[Value]) -> list[Value]:
            base, log_sum = v.load(reference, w), v.load(log_total, w)
            numbers = [v.add_index(j, r) for r in range(height)]
            extra = [v.load(v.at(v.at(bias, v.mul_index(number, bias_row)), w)) for number in numbers]
            loaded = [v.load(v.at(v.at(s, v.mul_index(number, row)), w)) for number in numbers]
            xs = [exponent(v, x, factor, e, base) for x, e in zip(loaded, extra, strict=True)]
            powers = exp2(v, *(probability(v, x, log_sum) for x in xs))
            return [
                v.add(total, v.select(v.equal(e, lowest), zero, power))
                for total, e, power in zip(added, extra, powers, strict=True)
            ]

        at = v.at(sums, v.mul_index(j, v.bytes))
        start = [v.load(at, r * v.bytes) for r in range(height)]
        for r, total in enumerate(v.loop(0, row, v.bytes, start, vector)):
            v.store(total, at, r * v.bytes)

    for_rows(v, n, (AT_ONCE, 1), keys)


def _rescale(v, width, ot, Dv, correction):
    """ot *= correction."""
    row = v.mul_index(width, v.bytes)

    def vector(here: Value) -> None:
        factor = v.load(correction, here)

        def column(d: Value) -> None:
            at = v.at(v.at(ot, v.mul_index(d, row)), here)
            v.store(v.mul(v.load(at), factor), at)

        v.each(Dv, column)

    for_vectors(v, width, vector)


def _join(v, width, row, state, other, kept, factors):
    """Take the sums of other keys into those so far: two states (reference, total, moment, best), `row` bytes apart.

    kept and factors are by what outputs so far, and those of the other keys, are to be multiplied.
    """
    zero, lowest = v.constant(0.0), v.constant(-INFINITY)

    def vector(here: Value) -> None:
        names = [v.add_index(v.mul_index(row, i), here) for i in range(4)]
        (reference, total, moment, best), (reference_2, total_2, moment_2, best_2) = (
            [v.load(x, at) for at in names] for x in (state, other)
        )
        # Where there was no key, there is nothing to weigh, and the reference means nothing.
        none, none_2 = v.equal(total, zero), v.equal(total_2, zero)
        new = v.maximum(v.select(none, lowest, reference), v.select(none_2, lowest, reference_2))
        new = v.select(v.equal(new, lowest), reference, new)
        steps = v.select(none, zero, v.sub(reference, new)), v.select(none_2, zero, v.sub(reference_2, new))
        keep, factor = exp2(v, *steps)

        def moved(step: Value, total: Value, moment: Value, by: Value) -> Value:
            # Where nothing is left, the step may be beyond what a product of it can be.
            return v.select(v.equal(by, zero), zero, v.mul(v.fma(step, total, moment), by))

        moments = v.add(moved(steps[0], total, moment, keep), moved(steps[1], total_2, moment_2, factor))
        total = v.fma(total_2, factor, v.mul(total, keep))
        for x, at in zip((new, total, moments, v.maximum(best_2, best)), names, strict=True):
            v.store(x, state, at)
        v.store(keep, kept, here)
        v.store(factor, factors, here)

    for_vectors(v, width, vector)


def _add_weighed(v, width, ot, Dv, kept, other, factors):
    """ot = kept * ot + factors * other, with one factor a query."""
    row = v.mul_index(width, v.bytes)

    def vector(here: Value) -> None:
        keep, factor = v.load(kept, here), v.load(factors, here)

        def column(d: Value) -> None:
            to = v.add_index(v.mul_index(d, row), here)
            v.store(v.fma(v.load(other, to), factor, v.mul(v.load(ot, to), keep)), ot, to)

        v.each(Dv, column)

    for_vectors(v, width, vector)


cap = emits(_cap)
settle = emits(_settle)
highest = emits(_highest)
move_reference = emits(_move_reference, returns=types.int64)
exponentiate = emits(partial(_exponentiate, weighted=False), returns=types.boolean)
exponentiate_weighted = emits(partial(_exponentiate, weighted=True), returns=types.boolean)
powers = emits(partial(_powers, weighted=False))
powers_weighted = emits(partial(_powers, weighted=True))
take_in = emits(partial(_take_in, weighted=False), returns=types.boolean)
take_in_weighted = emits(partial(_take_in, weighted=True), returns=types.boolean)
challenge = emits(_challenge)
add_sinks = emits(_add_sinks)
weigh = emits(_weigh)
rescale = emits(_rescale)
join = emits(_join)
add_weighed = emits(_add_weighed)
