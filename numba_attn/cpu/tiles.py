"""The stages of attention on one tile, as register-tile micro-kernels.

Queries are the lanes of every vector.  A block of `width` vectors of queries is kept transposed: Qt (D, block),
scores and probabilities S (n, block), output Ot (Dv, block), and one value a query for the maximum, the sum and so on.
So K and V are read in place, element by element, with any strides; and maximum, sum and exponential run down the
columns without ever crossing lanes: what one query gets never depends on its neighbours in the block.

Scores are in base 2: `scale` includes log2(e), as additive masks do.  Sums over the keys are made tile by tile, each
from zero, and then added up: with thousands of keys that leaves a third of the rounding error of one long sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps

from llvmlite import ir
from numba import types

from numba_attn.cpu.plan import HEIGHTS
from numba_attn.cpu.simd import I64, Value, Vectors, emits

LOG2_E = math.log2(math.e)
INFINITY = math.inf
# A row's reference maximum is raised only when a score exceeds it by this much: probabilities up to 2**16 lose nothing
# in floating point, and almost every tile can be exponentiated while its scores are still in registers.
HEADROOM = 16.0
# Exponentials at once: more hide the latency of each, fewer leave more registers.
AT_ONCE = 4

Rows = Callable[[Value, int], None]


# Shared parts ---------------------------------------------------------------------------------------------------------


def for_rows(v: Vectors, count: Value, heights: Sequence[int], body: Rows) -> None:
    """`body(first row, rows at once)` over `count` rows, in the largest steps first."""
    start = v.index(0)
    for height in heights:
        stop = v.whole_steps(start, count, height)

        def step(i: Value, _: list[Value], height: int = height) -> list[Value]:
            body(i, height)
            return []

        v.loop(start, stop, height, [], step)
        start = stop


def for_width(build: Callable[..., Value | None]) -> Callable[..., Value | None]:
    """`build(v, width, ...)` for the one of the register tile's widths that a block has at run time."""

    @wraps(build)
    def chosen(v: Vectors, width: Value, *values: Value) -> Value | None:
        return v.choose(width, {w: partial(build, v, w, *values) for w in HEIGHTS})

    return chosen


def for_vectors(v: Vectors, width: Value, body: Callable[[Value], object]) -> None:
    """`body(byte offset)` for each of the vectors of a block's row."""
    v.each(width, lambda w: body(v.mul_index(w, v.bytes)))


def lane_rows(v: Vectors, w: Value, rows: Value) -> list[Value]:
    """The row of each lane of vector w of a block of `rows` rows: the last one again beyond them."""
    first, last = v.mul_index(w, v.lanes), v.add_index(rows, -1)
    return [v.least(v.add_index(first, i), last) for i in range(v.lanes)]


def product(
    v: Vectors, acc: list[Value], a: Value, a_row: Value, a_step: Value, b: Value, count: Value, height: int, width: int
) -> list[Value]:
    """acc[i, :] += sum over k < count of a[i, k] * b[k, :], with all of acc in registers.

    a is read element by element at byte strides (a_row, a_step); b is (count, width vectors), contiguous.
    """
    # Four rows share a pointer: x86 addresses them as p, p + r, p + 2r and p + 3r.  From what it knows of the distance
    # between pointers, LLVM would walk from each row to the next, in a chain of additions that takes longer than the
    # products; and unrolling the loop, it would run out of registers for addresses.
    reach = [v.mul_index(a_row, i) for i in range(min(height, 4))]
    starts = [v.opaque(v.at(a, v.mul_index(a_row, i))) if i else a for i in range(0, height, 4)]
    pointers = 1 + len(starts)

    def body(_: Value, carried: list[Value]) -> list[Value]:
        (b, *starts), acc = carried[:pointers], carried[pointers:]
        columns = [v.load(b, w * v.bytes) for w in range(width)]
        for i in range(height):
            factor = v.splat(v.load_scalar(v.at(starts[i // 4], reach[i % 4])))
            for w in range(width):
                acc[i * width + w] = v.fma(factor, columns[w], acc[i * width + w])
        return [v.at(b, width * v.bytes), *(v.at(p, a_step) for p in starts), *acc]

    return v.loop(0, count, 1, [b, *starts, *acc], body, rolled=True)[pointers:]


# Products -------------------------------------------------------------------------------------------------------------


def _scores(v, width, k, k_row, k_step, n, D, qt, scale, bias, bias_row, reference, s, top):
    """s = k.qt, and top = the largest of scale * s + bias - reference of each query (0 where it has no reference).

    A bias of -inf masks, whatever the product is.
    """
    row = width * v.bytes
    lowest, factor = v.constant(-INFINITY), v.splat(scale)
    for w in range(width):
        v.store(lowest, top, w * v.bytes)

    def tile(i: Value, height: int) -> None:
        acc = [v.constant(0.0)] * (height * width)
        acc = product(v, acc, v.at(k, v.mul_index(i, k_row)), k_row, k_step, qt, D, height, width)
        s_i, bias_i = v.at(s, v.mul_index(i, row)), v.at(bias, v.mul_index(i, bias_row))
        for w in range(width):
            base, highest = _base(v, v.load(reference, w * v.bytes)), v.load(top, w * v.bytes)
            for r in range(height):
                extra = v.load(v.at(bias_i, v.mul_index(bias_row, r)), w * v.bytes)
                x = v.fma(acc[r * width + w], factor, v.sub(extra, base))
                highest = v.maximum(v.select(v.equal(extra, lowest), lowest, x), highest)
                v.store(acc[r * width + w], s_i, r * row + w * v.bytes)
            v.store(highest, top, w * v.bytes)

    for_rows(v, n, HEIGHTS[width], tile)


def _base(v: Vectors, reference: Value) -> Value:
    """What is subtracted from scores: the reference, or 0 where nothing has been attended to yet."""
    zero = v.constant(0.0)
    return v.select(v.equal(reference, v.constant(-INFINITY)), zero, reference)


def _probabilities(v, width, k, k_row, k_step, n, D, qt, scale, reference, total, sums, top, p):
    """p = exp2(scale * k.qt - reference) and total += its column sums, without the scores ever being stored.

    Returns whether no score exceeded the reference by more than the headroom; else total is as it was, and the tile is
    to be done again by way of `scores`.  The arithmetic is that of `scores` with no bias followed by `exponentiate`.
    """
    row, factor = width * v.bytes, v.splat(scale)
    for w in range(width):
        v.store(v.constant(-INFINITY), top, w * v.bytes)
        v.store(v.constant(0.0), sums, w * v.bytes)

    def tile(i: Value, height: int) -> None:
        acc = [v.constant(0.0)] * (height * width)
        acc = product(v, acc, v.at(k, v.mul_index(i, k_row)), k_row, k_step, qt, D, height, width)
        p_i = v.at(p, v.mul_index(i, row))
        for w in range(width):
            base = v.sub(v.constant(0.0), v.load(reference, w * v.bytes))
            highest, total_p = v.load(top, w * v.bytes), v.load(sums, w * v.bytes)
            for first in range(0, height, AT_ONCE):
                rows = range(first, min(first + AT_ONCE, height))
                exponents = [v.fma(acc[r * width + w], factor, base) for r in rows]
                for x in exponents:
                    highest = v.maximum(x, highest)
                for r, power in zip(rows, v.exp2(*exponents), strict=True):
                    v.store(power, p_i, r * row + w * v.bytes)
                    total_p = v.add(total_p, power)
            v.store(highest, top, w * v.bytes)
            v.store(total_p, sums, w * v.bytes)

    for_rows(v, n, HEIGHTS[width], tile)
    exceeded = ir.Constant(ir.IntType(1), 0)
    for w in range(width):
        above = v.less(v.constant(HEADROOM), v.load(top, w * v.bytes))
        exceeded = v.builder.or_(exceeded, v.any(above))
    accepted = v.builder.not_(exceeded)
    with v.builder.if_then(accepted):
        for w in range(width):
            v.store(v.add(v.load(total, w * v.bytes), v.load(sums, w * v.bytes)), total, w * v.bytes)
    return accepted


def _accumulate(v, width, value, value_row, value_step, Dv, n, p, ot):
    """ot += value.T @ p."""
    row = width * v.bytes

    def tile(i: Value, height: int) -> None:
        o = v.at(ot, v.mul_index(i, row))
        acc = [v.constant(0.0)] * (height * width)
        acc = product(v, acc, v.at(value, v.mul_index(i, value_step)), value_step, value_row, p, n, height, width)
        for x in range(height * width):
            v.store(v.add(v.load(o, x * v.bytes), acc[x]), o, x * v.bytes)

    for_rows(v, Dv, HEIGHTS[width], tile)


def _accumulate_carefully(v, width, value, value_row, value_step, Dv, n, p, ot):
    """The same bits, except that the values of masked keys (p = -0.0) are not used even where they are not finite."""
    row = v.mul_index(width, v.bytes)
    masked = v.builder.bitcast(v.constant(-0.0), v.bits)

    def outputs(d: Value, here: Value) -> None:
        o = v.at(v.at(ot, v.mul_index(d, row)), here)

        def key(j: Value, acc: list[Value]) -> list[Value]:
            x = v.splat(v.load_scalar(v.at(value, v.mul_index(d, value_step)), v.mul_index(j, value_row)))
            weight = v.load(v.at(p, v.mul_index(j, row)), here)
            is_masked = v.builder.icmp_signed("==", v.builder.bitcast(weight, v.bits), masked)
            return [v.fma(v.select(is_masked, v.constant(0.0), x), weight, acc[0])]

        v.store(v.add(v.load(o), v.loop(0, n, 1, [v.constant(0.0)], key)[0]), o)

    for_vectors(v, width, lambda here: v.each(Dv, lambda d: outputs(d, here)))


# Softmax --------------------------------------------------------------------------------------------------------------


def _raise_reference(v, width, top, reference, total, correction):
    """Raise each query's reference by `top` where that is more than the headroom, or where it has none.

    correction = the factor that takes old probabilities to the new reference, applied to total.  Returns bit 0: some
    correction is not 1; bit 1: some query is still without a reference.
    """
    b = v.builder
    lowest = v.constant(-INFINITY)

    def vector(here: Value, flags: list[Value]) -> list[Value]:
        old, above = v.load(reference, here), v.load(top, here)
        enough = v.select(v.equal(old, lowest), lowest, v.constant(HEADROOM))
        exceeds = v.less(enough, above)
        new = v.select(exceeds, v.add(_base(v, old), above), old)
        (factor,) = v.exp2(v.sub(old, _base(v, new)))
        v.store(new, reference, here)
        v.store(factor, correction, here)
        v.store(v.mul(v.load(total, here), factor), total, here)
        missing = b.shl(b.zext(v.any(v.equal(new, lowest)), I64), v.index(1))
        return [b.or_(flags[0], b.or_(b.zext(v.any(exceeds), I64), missing))]

    return v.loop(0, v.mul_index(width, v.bytes), v.bytes, [v.index(0)], vector)[0]


def _exponentiate(v, width, s, n, scale, bias, bias_row, reference, total):
    """s = exp2(scale * s + bias - reference) in place, -0.0 where masked; total += its column sums."""
    row = v.mul_index(width, v.bytes)
    lowest, masked, factor = v.constant(-INFINITY), v.constant(-0.0), v.splat(scale)

    def vector(here: Value) -> None:
        base = _base(v, v.load(reference, here))

        def keys(j: Value, height: int, sums: list[Value]) -> list[Value]:
            numbers = [v.add_index(j, r) for r in range(height)]
            at = [v.at(v.at(s, v.mul_index(number, row)), here) for number in numbers]
            extra = [v.load(v.at(v.at(bias, v.mul_index(number, bias_row)), here)) for number in numbers]
            xs = [v.fma(v.load(to), factor, v.sub(e, base)) for to, e in zip(at, extra, strict=True)]
            for e, power, to in zip(extra, v.exp2(*xs), at, strict=True):
                kept = v.select(v.equal(e, lowest), masked, power)
                v.store(kept, to)
                sums = [v.add(sums[0], kept)]
            return sums

        whole = v.whole_steps(v.index(0), n, AT_ONCE)
        sums = v.loop(0, whole, AT_ONCE, [v.constant(0.0)], lambda j, sums: keys(j, AT_ONCE, sums))
        (tile_sum,) = v.loop(whole, n, 1, sums, lambda j, sums: keys(j, 1, sums))
        v.store(v.add(v.load(total, here), tile_sum), total, here)

    for_vectors(v, width, vector)


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


def _normalise(v, width, ot, Dv, total, finite):
    """ot /= total, 0 for a query that attends to nothing; finite = 0, or NaN where a result is not finite."""
    row = v.mul_index(width, v.bytes)
    zero = v.constant(0.0)

    def vector(here: Value) -> None:
        sums = v.load(total, here)
        factor = v.select(v.equal(sums, zero), zero, v.div(v.constant(1.0), sums))

        def column(d: Value, check: list[Value]) -> list[Value]:
            at = v.at(v.at(ot, v.mul_index(d, row)), here)
            result = v.mul(v.load(at), factor)
            v.store(result, at)
            return [v.fma(result, zero, check[0])]

        v.store(v.loop(0, Dv, 1, [v.mul(sums, zero)], column)[0], finite, here)

    for_vectors(v, width, vector)


scores = emits(for_width(_scores))
probabilities = emits(for_width(_probabilities), returns=types.boolean)
accumulate = emits(for_width(_accumulate))
accumulate_carefully = emits(_accumulate_carefully)
raise_reference = emits(_raise_reference, returns=types.int64)
exponentiate = emits(_exponentiate)
rescale = emits(_rescale)
normalise = emits(_normalise)
