"""The stages of the gradient on one tile, as register-tile micro-kernels.

As in the forward pass, queries are the lanes of every vector.  With P the probabilities, made anew from their norms:

    P = exp2(scale * S + bias - reference - log2(sum)),   S = K Q^T
    dS = P (keep * dP - delta) * growth,                  dP = V dO^T

What P and dS are then multiplied with, rows of dO, Q and K, has head elements for lanes: the tiles of a whole group of
row blocks lie side by side for that, `p_row` bytes from key to key, and are the operand read element by element.  Where
products are those of pairs of bfloat16 numbers, both are rounded to such first.
"""

from __future__ import annotations

from functools import partial

from llvmlite import ir
from numba import types

from numba_attn.cpu.blocks import (
    AT_ONCE,
    INFINITY,
    LINE,
    fill_rows,
    for_keys,
    for_rows,
    for_vectors,
    for_width,
    for_widths,
)
from numba_attn.cpu.elementary import exp2
from numba_attn.cpu.emits import emits
from numba_attn.cpu.plan import HEIGHTS, WIDEST
from numba_attn.cpu.products import are_pairs, product, product_of_heads
from numba_attn.cpu.simd import I16, Value, Vectors
from numba_attn.cpu.softmax import exponent, probability
from numba_attn.cpu.tiles import paired


def _probabilities(v, width, row, k, k_row, k_step, n, D, qt, scale, bias, bias_row, norms, block, p, p_row, *, biased):
    """p = exp2(scale * k.qt + bias - reference - log2(sum)), -0.0 where masked, without the scores ever being stored.

    Norms are references, and `block` bytes after them the logarithms of sums, see `results`.

    Rows of qt are `row` bytes apart.  If not `biased` there is no bias.
    """
    factor, zero, pairs = v.splat(scale), v.constant(0.0), are_pairs(v, "k")
    lowest, masked = v.constant(-INFINITY), v.constant(-0.0)

    def tile(i: Value, height: int) -> None:
        acc = product_of_heads(v, v.at(k, v.mul_index(i, k_row)), k_row, k_step, qt, D, height, width, pairs, row)
        for w in range(width):
            base, log_total = v.load(norms, w * v.bytes), v.load(v.at(norms, block), w * v.bytes)
            for first in range(0, height, AT_ONCE):
                numbers = [v.add_index(i, r) for r in range(first, min(first + AT_ONCE, height))]
                products = [acc[r * width + w] for r in range(first, min(first + AT_ONCE, height))]
                extra = [v.load(v.at(bias, v.mul_index(j, bias_row)), w * v.bytes) if biased else zero for j in numbers]
                exponents = [v.fma(x, factor, v.sub(e, base)) for x, e in zip(products, extra, strict=True)]
                powers = exp2(v, *(probability(v, x, log_total) for x in exponents))
                for j, e, power in zip(numbers, extra, powers, strict=True):
                    kept = v.select(v.equal(e, lowest), masked, power) if biased else power
                    v.store(kept, v.at(p, v.mul_index(j, p_row)), w * v.bytes)

    for_rows(v, n, HEIGHTS[width], tile)


def _weights(v, width, s, n, scale, bias, bias_row, norms, block, p, p_row):
    """p = exp2(scale * s + bias - reference - log2(sum)), -0.0 where masked; norms as in `probabilities`."""
    row = v.mul_index(width, v.bytes)
    lowest, masked, factor = v.constant(-INFINITY), v.constant(-0.0), v.splat(scale)

    def vector(here: Value) -> None:
        base, log_total = v.load(norms, here), v.load(v.at(norms, block), here)

        def keys(j: Value, height: int, _: list[Value]) -> list[Value]:
            numbers = [v.add_index(j, r) for r in range(height)]
            extra = [v.load(v.at(bias, v.mul_index(number, bias_row)), here) for number in numbers]
            loaded = [v.load(v.at(s, v.mul_index(number, row)), here) for number in numbers]
            xs = [exponent(v, x, factor, e, base) for x, e in zip(loaded, extra, strict=True)]
            powers = exp2(v, *(probability(v, x, log_total) for x in xs))
            for number, e, power in zip(numbers, extra, powers, strict=True):
                v.store(v.select(v.equal(e, lowest), masked, power), v.at(p, v.mul_index(number, p_row)), here)
            return []

        for_keys(v, n, [], keys)

    for_vectors(v, width, vector)


def _score_gradients(v, width, row, value, value_row, value_step, n, Dv, gt, delta, p, ds, p_row):
    """ds = p * (value.gt - delta), 0 where masked; rows of gt are `row` bytes apart."""
    pairs = are_pairs(v, "value")

    def tile(i: Value, height: int) -> None:
        values = v.at(value, v.mul_index(i, value_row))
        acc = product_of_heads(v, values, value_row, value_step, gt, Dv, height, width, pairs, row)
        for r in range(height):
            at = v.mul_index(v.add_index(i, r), p_row)
            for w in range(width):
                here = v.add_index(at, w * v.bytes)
                slope = v.sub(acc[r * width + w], v.load(delta, w * v.bytes))
                v.store(_where_attended(v, v.load(p, here), slope), ds, here)

    for_rows(v, n, HEIGHTS[width], tile)


def _where_attended(v: Vectors, p: Value, slope: Value) -> Value:
    """p * slope, but 0 for a masked key (p = -0.0), whatever the slope is."""
    return v.select(v.is_negative_zero(p), v.constant(0.0), v.mul(p, slope))


def _differentiate(v, width, dp, n, keep, keep_row, growth, growth_row, delta, p, ds, p_row):
    """ds = p * (keep * dp - delta) * growth, 0 where masked; p *= keep.

    The rows of dp are those of a block; those of keep and growth are 0 bytes apart where there is but one.
    """
    row = v.mul_index(width, v.bytes)

    def vector(here: Value) -> None:
        base = v.load(delta, here)

        def key(j: Value) -> None:
            at = v.add_index(v.mul_index(j, p_row), here)
            weight, kept = v.load(p, at), v.load(keep, v.add_index(v.mul_index(j, keep_row), here))
            grown = v.load(growth, v.add_index(v.mul_index(j, growth_row), here))
            above = v.sub(v.mul(kept, v.load(dp, v.add_index(v.mul_index(j, row), here))), base)
            v.store(_where_attended(v, weight, v.mul(above, grown)), ds, at)
            v.store(v.mul(weight, kept), p, at)

        v.each(n, key)

    for_vectors(v, width, vector)


def _cap_growth(v, width, s, n, growth):
    """growth = 1 - s**2, the derivative of the cap where it has made s."""
    one = v.constant(1.0)

    def vector(at: Value) -> None:
        y = v.load(s, at)
        v.store(v.fma(v.sub(v.constant(0.0), y), y, one), growth, at)

    for_vectors(v, v.mul_index(width, n), vector)


def _multiply(v, width, n, by, x, x_row):
    """x *= by, a tile of a block, but where x is 0, as it is for a masked key; rows of x are `x_row` bytes apart."""
    row, zero = v.mul_index(width, v.bytes), v.constant(0.0)

    def key(j: Value) -> None:
        to, of = v.at(x, v.mul_index(j, x_row)), v.at(by, v.mul_index(j, row))

        def vector(here: Value) -> None:
            y = v.load(to, here)
            v.store(v.select(v.equal(y, zero), y, v.mul(y, v.load(of, here))), to, here)

        for_vectors(v, width, vector)

    v.each(n, key)


def _scale(v, x, vectors, factor):
    """x *= factor."""
    by = v.splat(factor)
    for_vectors(v, vectors, lambda at: v.store(v.mul(v.load(x, at), by), x, at))


def _fill(v, width, x, x_row, n, value):
    """x = value, in `width` vectors of n rows that are `x_row` bytes apart."""
    fill_rows(v, width, x, x_row, n, v.splat(value))


def _pair_keys(v, width, n, x, x_row, to):
    """to (half of n, block) = rows of x (n, block), `x_row` bytes apart, two and two, as pairs of bfloat16."""
    row = v.mul_index(width, v.bytes)

    def vector(here: Value) -> None:
        def keys(j: Value, height: int) -> None:
            rows = [v.load(v.at(x, v.mul_index(v.add_index(j, r), x_row)), here) for r in range(height)]
            (both,) = paired(v, rows)
            v.store(both, v.at(to, v.mul_index(v.half(j), row)), here)

        for_rows(v, n, (2, 1), keys)

    for_vectors(v, width, vector)


def _pair_lanes(v, n, lanes, x, x_row):
    """So many lanes of n rows of x, `x_row` bytes apart, as bfloat16 in place, so that two neighbours are a pair.

    The neighbour of a last one is what its vector has there: of a row without a number, which is as the last one is,
    with probabilities of 0.
    """
    b, short = v.builder, ir.VectorType(I16, v.lanes)
    half, shift = (ir.Constant(v.bits, [c] * v.lanes) for c in (0x8000, 16))

    def row(j: Value) -> None:
        line = v.at(x, v.mul_index(j, x_row))

        def vector(i: Value, _: list[Value]) -> list[Value]:
            bits = b.bitcast(v.load(line, v.mul_index(i, v.size)), v.bits)
            v.store(b.trunc(b.lshr(b.add(bits, half), shift), short), line, v.mul_index(i, 2))
            return []

        v.loop(0, lanes, v.lanes, [], vector)

    v.each(n, row)


def _add_product(v, a, a_row, a_step, rows, count, b, b_row, vectors, to, to_row):
    """to (rows, vectors) += a (rows, count) . b (count, vectors), a read element by element.

    Of pairs, an element of a, and a row of b, are two of `count`.
    """
    pairs = are_pairs(v, "b")

    def columns(first: Value, width: int) -> None:
        here = v.mul_index(first, v.bytes)

        def tile(i: Value, height: int) -> None:
            start = v.at(a, v.mul_index(i, a_row))
            # The next rows, which are as far apart as hardware does not foresee: sums of keys and values are in no near
            # cache.
            for r in range(height, 2 * height):
                line = v.at(to, v.add_index(v.mul_index(v.add_index(i, r), to_row), here))
                for byte in [*range(0, width * v.bytes - 1, LINE), width * v.bytes - 1]:
                    v.prefetch(line, byte)
            acc = product(v, start, a_row, a_step, v.at(b, here), count, height, width, pairs, b_row)
            for r in range(height):
                line = v.at(to, v.add_index(v.mul_index(v.add_index(i, r), to_row), here))
                for w in range(width):
                    v.store(v.add(v.load(line, w * v.bytes), acc[r * width + w]), line, w * v.bytes)

        for_rows(v, rows, HEIGHTS[width], tile)

    for_widths(v, vectors, range(WIDEST, 0, -1), columns)


def _add_product_of_columns(v, a, a_column, rows, count, b, b_row, vectors, to, to_row):
    """The same for an a whose rows are its columns in memory, so many bytes apart."""
    _add_product(v, a, v.index(v.size), a_column, rows, count, b, b_row, vectors, to, to_row)


def _add_transposed(v, width, x, x_row, rows, n, to, to_row):
    """to (rows, n) += x.T, a tile of a block; rows are `x_row` and `to_row` bytes apart, those of `to` contiguous."""
    whole = v.whole_steps(v.index(0), n, v.lanes)

    def squares(w: Value) -> None:
        here, first = v.at(x, v.mul_index(w, v.bytes)), v.mul_index(w, v.lanes)

        def square(j: Value, _: list[Value]) -> list[Value]:
            keys = [v.load(here, v.mul_index(v.add_index(j, r), x_row)) for r in range(v.lanes)]
            for i, line in enumerate(v.transpose(keys)):
                lane = v.add_index(first, i)
                at = v.at(to, v.add_index(v.mul_index(lane, to_row), v.mul_index(j, v.size)))
                with v.builder.if_then(v.builder.icmp_signed("<", lane, rows)):
                    v.store(v.add(v.load(at), line), at)
            return []

        v.loop(0, whole, v.lanes, [], square)

    def key(j: Value, _: list[Value]) -> list[Value]:
        def lane(i: Value) -> None:
            at = v.at(to, v.add_index(v.mul_index(i, to_row), v.mul_index(j, v.size)))
            here = v.at(x, v.add_index(v.mul_index(j, x_row), v.mul_index(i, v.size)))
            v.store(v.add(v.load_scalar(at), v.load_scalar(here)), at)

        v.each(rows, lane)
        return []

    v.each(width, squares)
    v.loop(whole, n, 1, [], key)


def _sum_rows(v, width, x, x_row, n, to, to_step):
    """to (n) += the sums of a tile of a block over its rows, one a key, `to_step` bytes apart.

    Lanes beyond the rows add nothing: they are as the last one is, with probabilities of 0.
    """

    def key(j: Value) -> None:
        line = v.at(x, v.mul_index(j, x_row))

        def vector(w: Value, total: list[Value]) -> list[Value]:
            return [v.add(total[0], v.load(line, v.mul_index(w, v.bytes)))]

        total, step = v.loop(0, width, 1, [v.constant(0.0)], vector)[0], v.lanes // 2
        while step:
            total = v.add(total, v.shuffle(total, total, [lane ^ step for lane in range(v.lanes)]))
            step //= 2
        at = v.at(to, v.mul_index(j, to_step))
        v.store(v.add(v.load_scalar(at), v.builder.extract_element(total, v.index(0))), at)

    v.each(n, key)


def _sum_keys(v, width, x, x_row, n, to):
    """to = the sums of a tile of a block over its n keys, one a query; rows of x are `x_row` bytes apart."""

    def vector(here: Value) -> None:
        def key(j: Value, total: list[Value]) -> list[Value]:
            return [v.add(total[0], v.load(v.at(x, v.mul_index(j, x_row)), here))]

        v.store(v.loop(0, n, 1, [v.constant(0.0)], key)[0], to, here)

    for_vectors(v, width, vector)


def _sum_distances(v, width, x, x_row, n, first, to):
    """to = the sums of x * |distance| over n keys, one a query; query lane 0 is `first` keys after key 0."""
    lanes = ir.Constant(v.type, [float(lane) for lane in range(v.lanes)])

    def vector(w: Value) -> None:
        here = v.mul_index(w, v.bytes)
        start = v.splat(v.builder.sitofp(v.add_index(first, v.mul_index(w, v.lanes)), v.element))

        def key(j: Value, carried: list[Value]) -> list[Value]:
            distance, total = carried
            total = v.fma(v.load(v.at(x, v.mul_index(j, x_row)), here), v.absolute(distance), total)
            return [v.sub(distance, v.constant(1.0)), total]

        v.store(v.loop(0, n, 1, [v.add(start, lanes), v.constant(0.0)], key)[1], to, here)

    v.each(width, vector)


def _column_dots(v, width, a, b, n, to):
    """to = the column sums of a * b, two tiles (n, block); where a is 0, so is the product."""
    row, zero = v.mul_index(width, v.bytes), v.constant(0.0)

    def vector(here: Value) -> None:
        def line(d: Value, total: list[Value]) -> list[Value]:
            at = v.add_index(v.mul_index(d, row), here)
            x = v.load(a, at)
            return [v.fma(x, v.select(v.equal(x, zero), zero, v.load(b, at)), total[0])]

        v.store(v.loop(0, n, 1, [zero], line)[0], to, here)

    for_vectors(v, width, vector)


def _finite(v: Vectors, x: Value) -> tuple[Value, Value]:
    """x, but 0 where it is not finite; and where it is."""
    zero = v.constant(0.0)
    finite = v.equal(v.mul(x, zero), zero)
    return v.select(finite, x, zero), finite


def _drop_infinite(v, x, vectors):
    """x = 0 where it is not finite; whether there was such a number."""
    zero = v.constant(0.0)

    def vector(i: Value, found: list[Value]) -> list[Value]:
        at = v.mul_index(i, v.bytes)
        kept, finite = _finite(v, v.load(x, at))
        v.store(kept, x, at)
        return [v.builder.or_(found[0], v.builder.not_(finite))]

    none = v.builder.fcmp_ordered("!=", zero, zero)
    return v.any(v.loop(0, vectors, 1, [none], vector)[0])


def _copy_finite(v, x, x_row, rows, vectors, to, to_row):
    """to = x (rows, vectors), but 0 where it is not finite; rows are `x_row` and `to_row` bytes apart."""

    def row(i: Value) -> None:
        of, line = v.at(x, v.mul_index(i, x_row)), v.at(to, v.mul_index(i, to_row))
        for_vectors(v, vectors, lambda at: v.store(_finite(v, v.load(of, at))[0], line, at))

    v.each(rows, row)


def _add_vectors(v, x, vectors, to):
    """to += x."""
    for_vectors(v, vectors, lambda at: v.store(v.add(v.load(to, at), v.load(x, at)), to, at))


def _copy(v, x, vectors, to):
    for_vectors(v, vectors, lambda at: v.store(v.load(x, at), to, at))


probabilities = emits(partial(for_width(_probabilities), biased=False), apart=True)
biased_probabilities = emits(partial(for_width(_probabilities), biased=True), apart=True)
weights = emits(_weights)
score_gradients = emits(for_width(_score_gradients), apart=True)
differentiate = emits(_differentiate)
cap_growth = emits(_cap_growth)
multiply = emits(_multiply)
scale = emits(_scale)
fill = emits(_fill)
pair_keys = emits(_pair_keys)
pair_lanes = emits(_pair_lanes)
add_product = emits(_add_product, apart=True)
add_product_of_columns = emits(_add_product_of_columns, apart=True)
add_transposed = emits(_add_transposed)
sum_rows = emits(_sum_rows)
sum_keys = emits(_sum_keys)
sum_distances = emits(_sum_distances)
column_dots = emits(_column_dots)
drop_infinite = emits(_drop_infinite, returns=types.boolean)
copy_finite = emits(_copy_finite)
add_vectors = emits(_add_vectors)
copy = emits(_copy)
