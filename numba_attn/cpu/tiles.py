"""The stages of attention on one tile, as register-tile micro-kernels.

Queries are the lanes of every vector.  A block of `width` vectors of queries is kept transposed: Qt (D, block),
scores and probabilities S (n, block), output Ot (Dv, block), and one value a query for the maximum, the sum and so on.
So K and V are read in place, element by element, with any strides; and maximum, sum and exponential run down the
columns without ever crossing lanes: what one query gets never depends on its neighbours in the block.

Scores are in base 2: Q is packed times scale * log2(e), additive masks times log2(e).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps

from llvmlite import ir
from numba import types

from numba_attn.cpu.plan import HEIGHTS
from numba_attn.cpu.simd import I8, I64, Value, Vectors, emits

LOG2_E = math.log2(math.e)
INFINITY = math.inf
# A row's reference maximum is raised only when a score exceeds it by this much: probabilities up to 2**16 lose nothing
# in floating point, and almost every tile can be exponentiated while its scores are still in registers.
HEADROOM = 16.0

# What a mask leaves of a tile of scores.
EMPTY, PARTIAL, FULL = 0, 1, 2

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


def _scores(v, width, k, k_row, k_step, n, D, qt, bias, bias_row, s, top):
    """S = k.qt + bias, and top = the largest score of each query.  A bias of -inf masks, whatever the product is."""
    row = width * v.bytes
    lowest = v.constant(-INFINITY)
    for w in range(width):
        v.store(lowest, top, w * v.bytes)

    def tile(i: Value, height: int) -> None:
        acc = [v.constant(0.0)] * (height * width)
        acc = product(v, acc, v.at(k, v.mul_index(i, k_row)), k_row, k_step, qt, D, height, width)
        s_i, bias_i = v.at(s, v.mul_index(i, row)), v.at(bias, v.mul_index(i, bias_row))
        for w in range(width):
            highest = v.load(top, w * v.bytes)
            for r in range(height):
                extra = v.load(v.at(bias_i, v.mul_index(bias_row, r)), w * v.bytes)
                score = v.select(v.equal(extra, lowest), lowest, v.add(acc[r * width + w], extra))
                v.store(score, s_i, r * row + w * v.bytes)
                highest = v.maximum(score, highest)
            v.store(highest, top, w * v.bytes)

    for_rows(v, n, HEIGHTS[width], tile)


def _probabilities(v, width, k, k_row, k_step, n, D, qt, reference, total, new_total, top, p):
    """P = exp2(k.qt - reference) and total += its column sums, without the scores ever being stored.

    Returns whether no score exceeded the reference by more than the headroom; else total is as it was, and the tile is
    to be done again by way of `scores`.  The arithmetic is that of `scores` with no bias followed by `exponentiate`.
    """
    row = width * v.bytes
    for w in range(width):
        v.store(v.constant(-INFINITY), top, w * v.bytes)
        v.store(v.load(total, w * v.bytes), new_total, w * v.bytes)

    def tile(i: Value, height: int) -> None:
        acc = [v.constant(0.0)] * (height * width)
        acc = product(v, acc, v.at(k, v.mul_index(i, k_row)), k_row, k_step, qt, D, height, width)
        p_i = v.at(p, v.mul_index(i, row))
        for w in range(width):
            m, highest, sums = v.load(reference, w * v.bytes), v.load(top, w * v.bytes), v.load(new_total, w * v.bytes)
            exponents = [v.sub(acc[r * width + w], m) for r in range(height)]
            for x in exponents:
                highest = v.maximum(x, highest)
            for r, power in enumerate(v.exp2(*exponents)):
                v.store(power, p_i, r * row + w * v.bytes)
                sums = v.add(sums, power)
            v.store(highest, top, w * v.bytes)
            v.store(sums, new_total, w * v.bytes)

    for_rows(v, n, HEIGHTS[width], tile)
    exceeded = ir.Constant(ir.IntType(1), 0)
    for w in range(width):
        above = v.less(v.constant(HEADROOM), v.load(top, w * v.bytes))
        exceeded = v.builder.or_(exceeded, v.any(above))
    accepted = v.builder.not_(exceeded)
    with v.builder.if_then(accepted):
        for w in range(width):
            v.store(v.load(new_total, w * v.bytes), total, w * v.bytes)
    return accepted


def _accumulate(v, width, value, value_row, value_step, Dv, n, p, ot):
    """Ot += value.T @ p."""
    row = width * v.bytes

    def tile(i: Value, height: int) -> None:
        o = v.at(ot, v.mul_index(i, row))
        acc = [v.load(o, x * v.bytes) for x in range(height * width)]
        acc = product(v, acc, v.at(value, v.mul_index(i, value_step)), value_step, value_row, p, n, height, width)
        for x in range(height * width):
            v.store(acc[x], o, x * v.bytes)

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

        v.store(v.loop(0, n, 1, [v.load(o)], key)[0], o)

    for_vectors(v, width, lambda here: v.each(Dv, lambda d: outputs(d, here)))


# Softmax --------------------------------------------------------------------------------------------------------------


def _raise_reference(v, width, top, reference, total, correction):
    """Raise each query's reference maximum to `top` where that exceeds it by more than the headroom.

    correction = the factor that takes old probabilities to the new reference, applied to total; top = what to subtract
    from the scores (the reference, or 0 where nothing has been attended to yet).  Returns bit 0: some correction is
    not 1; bit 1: some query is still without a reference.
    """
    b = v.builder
    lowest = v.constant(-INFINITY)

    def vector(here: Value, flags: list[Value]) -> list[Value]:
        old, highest = v.load(reference, here), v.load(top, here)
        exceeds = v.less(v.constant(HEADROOM), v.sub(highest, old))
        new = v.select(exceeds, highest, old)
        without = v.equal(new, lowest)
        base = v.select(without, v.constant(0.0), new)
        (factor,) = v.exp2(v.sub(old, base))
        v.store(new, reference, here)
        v.store(base, top, here)
        v.store(factor, correction, here)
        v.store(v.mul(v.load(total, here), factor), total, here)
        missing = b.shl(b.zext(v.any(without), I64), v.index(1))
        return [b.or_(flags[0], b.or_(b.zext(v.any(exceeds), I64), missing))]

    return v.loop(0, v.mul_index(width, v.bytes), v.bytes, [v.index(0)], vector)[0]


def _exponentiate(v, width, s, n, base, total):
    """S = exp2(s - base) in place, -0.0 where masked; total += its column sums."""
    row = v.mul_index(width, v.bytes)
    lowest, masked = v.constant(-INFINITY), v.constant(-0.0)

    def vector(here: Value) -> None:
        subtracted = v.load(base, here)

        def keys(j: Value, height: int, sums: list[Value]) -> list[Value]:
            at = [v.at(v.at(s, v.mul_index(v.add_index(j, r), row)), here) for r in range(height)]
            loaded = [v.load(x) for x in at]
            powers = v.exp2(*(v.sub(score, subtracted) for score in loaded))
            for score, power, to in zip(loaded, powers, at, strict=True):
                kept = v.select(v.equal(score, lowest), masked, power)
                v.store(kept, to)
                sums = [v.add(sums[0], kept)]
            return sums

        whole = v.whole_steps(v.index(0), n, 4)
        sums = v.loop(0, whole, 4, [v.load(total, here)], lambda j, sums: keys(j, 4, sums))
        v.store(v.loop(whole, n, 1, sums, lambda j, sums: keys(j, 1, sums))[0], total, here)

    for_vectors(v, width, vector)


def _rescale(v, width, ot, Dv, correction):
    """Ot *= correction."""
    row = v.mul_index(width, v.bytes)

    def vector(here: Value) -> None:
        factor = v.load(correction, here)

        def column(d: Value) -> None:
            at = v.at(v.at(ot, v.mul_index(d, row)), here)
            v.store(v.mul(v.load(at), factor), at)

        v.each(Dv, column)

    for_vectors(v, width, vector)


def _normalise(v, width, ot, Dv, total, finite):
    """Ot /= total, 0 for a query that attends to nothing; finite = 0, or NaN where a result is not finite."""
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


# Masks ----------------------------------------------------------------------------------------------------------------


def _as_bias(v: Vectors, x: Value) -> Value:
    """A loaded mask value, or a vector of them, as what is added to base-2 scores: True is 0, False -inf."""
    b = v.builder
    vector = isinstance(x.type, ir.VectorType)
    kind, element = (v.type, x.type.element) if vector else (v.element, x.type)

    def constant(value: float, like: ir.Type = kind) -> Value:
        return ir.Constant(like, [value] * v.lanes if vector else value)

    if element == I8:
        return b.select(b.icmp_unsigned("!=", x, constant(0, x.type)), constant(0.0), constant(-INFINITY))
    if element != v.element:
        x = b.fptrunc(x, kind) if v.size == 4 else b.fpext(x, kind)
    # The largest finite numbers stay finite: they are a penalty, only -inf is a mask.
    scaled, floor = b.fmul(x, constant(v.rounded(LOG2_E))), constant(-v.largest)
    scaled = b.select(b.fcmp_ordered("<", scaled, floor), floor, scaled)
    return b.select(b.fcmp_ordered("==", x, constant(-INFINITY)), x, scaled)


def _mask_rows(v, width, bias, mask, mask_row, rows, n):
    """Bias (n, block) from a mask whose keys are contiguous, transposed in registers; n a multiple of the lanes."""
    row = v.mul_index(width, v.bytes)
    element, size = v.pointee("mask")
    kind = ir.VectorType(element, v.lanes)

    def vector(w: Value, here: Value) -> None:
        lanes = [v.at(mask, v.mul_index(mask_row, i)) for i in _lanes(v, w, rows)]

        def keys(j: Value, _: list[Value]) -> list[Value]:
            at = v.mul_index(j, size)
            columns = v.transpose([_as_bias(v, v.builder.load(v.at(lane, at), align=1, typ=kind)) for lane in lanes])
            for r, column in enumerate(columns):
                v.store(column, v.at(bias, v.mul_index(v.add_index(j, r), row)), here)
            return []

        v.loop(0, n, v.lanes, [], keys)

    v.each(width, lambda w: vector(w, v.mul_index(w, v.bytes)))


def _mask_keys(v, width, bias, mask, mask_step, n):
    """Bias (n, block) from a mask that is the same for every query."""
    row = v.mul_index(width, v.bytes)
    element, _ = v.pointee("mask")

    def key(j: Value) -> None:
        x = v.splat(_as_bias(v, v.builder.load(v.at(mask, v.mul_index(j, mask_step)), align=1, typ=element)))
        for_vectors(v, width, lambda here: v.store(x, v.at(bias, v.mul_index(j, row)), here))

    v.each(n, key)


def _mask_elements(v, width, bias, mask, mask_row, mask_step, rows, first, n):
    """Bias (n, block), keys from `first` on, from a mask of any strides, element by element."""
    row = v.mul_index(width, v.bytes)
    element, _ = v.pointee("mask")
    last = v.add_index(rows, -1)

    def key(j: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            at = v.at(v.at(mask, v.mul_index(mask_row, v.least(i, last))), v.mul_index(j, mask_step))
            x = _as_bias(v, v.builder.load(at, align=1, typ=element))
            v.store(x, v.at(bias, v.mul_index(j, row)), v.mul_index(i, v.size))

        v.each(v.mul_index(width, v.lanes), lane)
        return []

    v.loop(first, n, 1, [], key)


def _mask_outside(v, width, bias, source, source_row, n, low, high):
    """Bias = source (rows `source_row` bytes apart), but -inf where the key is not in the query's [low, high).

    Keys count from the first of the tile; low and high hold a whole number a query.
    """
    row = v.mul_index(width, v.bytes)
    lowest = v.constant(-INFINITY)

    def vector(here: Value) -> None:
        first, end = v.load(low, here), v.load(high, here)

        def key(j: Value, number: list[Value]) -> list[Value]:
            x = v.load(v.at(source, v.mul_index(j, source_row)), here)
            inside = v.builder.and_(v.builder.not_(v.less(number[0], first)), v.less(number[0], end))
            v.store(v.select(inside, x, lowest), v.at(bias, v.mul_index(j, row)), here)
            return [v.add(number[0], v.constant(1.0))]

        v.loop(0, n, 1, [v.constant(0.0)], key)

    for_vectors(v, width, vector)


def _classify(v, width, bias, n):
    """EMPTY if the bias (n, block) masks everything, FULL if it does nothing, PARTIAL otherwise."""
    b = v.builder
    zero, lowest = v.constant(0.0), v.constant(-INFINITY)

    def vector(here: Value, found: list[Value]) -> list[Value]:
        x = v.load(bias, here)
        return [b.or_(found[0], b.fcmp_unordered("!=", x, lowest)), b.or_(found[1], b.fcmp_unordered("!=", x, zero))]

    nothing = b.fcmp_ordered("!=", zero, zero)
    end = v.mul_index(v.mul_index(width, v.bytes), n)
    kept, changed = v.loop(0, end, v.bytes, [nothing, nothing], vector)
    full = b.select(v.any(changed), v.index(PARTIAL), v.index(FULL))
    return b.select(v.any(kept), full, v.index(EMPTY))


def _count_true(v, mask, n):
    """How many of n contiguous booleans are True, for the quickest answer to "all?" and "none?"."""
    b = v.builder
    wide = v.bytes
    vector, bits = ir.VectorType(I8, wide), ir.IntType(wide)

    def chunk(j: Value, count: list[Value]) -> list[Value]:
        x = b.load(v.at(mask, j), align=1, typ=vector)
        true = b.ctpop(b.bitcast(b.icmp_unsigned("!=", x, ir.Constant(vector, [0] * wide)), bits))
        return [b.add(count[0], true if wide == 64 else b.zext(true, I64))]

    def one(j: Value, count: list[Value]) -> list[Value]:
        x = b.load(v.at(mask, j), align=1, typ=I8)
        return [b.add(count[0], b.zext(b.icmp_unsigned("!=", x, ir.Constant(I8, 0)), I64))]

    whole = v.whole_steps(v.index(0), n, wide)
    return v.loop(whole, n, 1, v.loop(0, whole, wide, [v.index(0)], chunk), one)[0]


# Queries in, results out ----------------------------------------------------------------------------------------------


def _lanes(v: Vectors, w: Value, rows: Value) -> list[Value]:
    """The row of each lane of vector w of a block of `rows` rows: the last one again beyond them."""
    first, last = v.mul_index(w, v.lanes), v.add_index(rows, -1)
    return [v.least(v.add_index(first, i), last) for i in range(v.lanes)]


def _whole_squares(v: Vectors, step: Value, count: Value) -> Value:
    """How many of `count` elements, `step` bytes apart, can be moved in squares of lanes x lanes."""
    contiguous = v.builder.icmp_signed("==", step, v.index(v.size))
    return v.builder.select(contiguous, v.whole_steps(v.index(0), count, v.lanes), v.index(0))


def _pack_queries(v, width, q, q_row, q_step, rows, D, scale, qt):
    """Qt (D, block) = scale * q.T; the last row again in lanes beyond `rows`."""
    row = v.mul_index(width, v.bytes)
    factor = v.splat(scale)
    whole = _whole_squares(v, q_step, D)

    def squares(w: Value) -> None:
        lanes = [v.at(q, v.mul_index(q_row, i)) for i in _lanes(v, w, rows)]

        def square(d: Value, _: list[Value]) -> list[Value]:
            columns = v.transpose([v.mul(factor, v.load(lane, v.mul_index(d, v.size))) for lane in lanes])
            for r, column in enumerate(columns):
                v.store(column, v.at(qt, v.mul_index(v.add_index(d, r), row)), v.mul_index(w, v.bytes))
            return []

        v.loop(0, whole, v.lanes, [], square)

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            source = v.at(q, v.mul_index(q_row, v.least(i, v.add_index(rows, -1))))
            x = v.builder.fmul(scale, v.load_scalar(source, v.mul_index(d, q_step)))
            v.store(x, v.at(qt, v.mul_index(d, row)), v.mul_index(i, v.size))

        v.each(v.mul_index(width, v.lanes), lane)
        return []

    v.each(width, squares)
    v.loop(whole, D, 1, [], line)


def _write_rows(v, width, ot, Dv, out, out_row, out_step, rows):
    """Out (rows, Dv) = ot.T."""
    row = v.mul_index(width, v.bytes)
    whole = _whole_squares(v, out_step, Dv)

    def squares(w: Value) -> None:
        first = v.mul_index(w, v.lanes)

        def square(d: Value, _: list[Value]) -> list[Value]:
            at = v.at(v.at(ot, v.mul_index(d, row)), v.mul_index(w, v.bytes))
            for i, line in enumerate(v.transpose([v.load(at, v.mul_index(row, r)) for r in range(v.lanes)])):
                lane = v.add_index(first, i)
                with v.builder.if_then(v.builder.icmp_signed("<", lane, rows)):
                    v.store(line, v.at(out, v.mul_index(out_row, lane)), v.mul_index(d, v.size))
            return []

        v.loop(0, whole, v.lanes, [], square)

    def line(d: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            x = v.load_scalar(v.at(ot, v.mul_index(d, row)), v.mul_index(i, v.size))
            v.store(x, v.at(out, v.mul_index(out_row, i)), v.mul_index(d, out_step))

        v.each(rows, lane)
        return []

    v.each(width, squares)
    v.loop(whole, Dv, 1, [], line)


def _fill_lanes(v, memory, value, vectors):
    """`vectors` vectors of working memory = value."""
    x = v.splat(value)
    v.each(vectors, lambda i: v.store(x, memory, v.mul_index(i, v.bytes)))


def _fill(v, array, row, step, rows, columns, value):
    """Array (rows, columns) = value, at any strides."""

    def line(i: Value) -> None:
        v.each(columns, lambda j: v.store(value, v.at(array, v.mul_index(i, row)), v.mul_index(j, step)))

    v.each(rows, line)


scores = emits(for_width(_scores))
probabilities = emits(for_width(_probabilities), returns=types.boolean)
accumulate = emits(for_width(_accumulate))
accumulate_carefully = emits(_accumulate_carefully)
raise_reference = emits(_raise_reference, returns=types.int64)
exponentiate = emits(_exponentiate)
rescale = emits(_rescale)
normalise = emits(_normalise)
mask_rows = emits(_mask_rows)
mask_keys = emits(_mask_keys)
mask_elements = emits(_mask_elements)
mask_outside = emits(_mask_outside)
classify = emits(_classify, returns=types.int64)
count_true = emits(_count_true, returns=types.int64)
pack_queries = emits(_pack_queries)
write_rows = emits(_write_rows)
fill = emits(_fill)
fill_lanes = emits(_fill_lanes)
