"""The stages of attention on one tile: products, with what is done to them while they are in registers.

Queries are the lanes of every vector.  A block of `width` vectors of queries is kept transposed: Qt (D, block),
scores and probabilities S (n, block), output Ot (Dv, block), and one value a query for the maximum, the sum and so on.
So K and V are read in place, element by element, with any strides; and maximum, sum and exponential run down the
columns without ever crossing lanes: what one query gets never depends on its neighbours in the block.

Scores are in base 2: `scale` includes log2(e), as additive masks do.  Sums over the keys are made tile by tile, each
from zero, and then added up: with thousands of keys that leaves a third of the rounding error of one long sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from llvmlite import ir
from numba import types

from numba_attn.cpu import amx, target
from numba_attn.cpu.blocks import AT_ONCE, INFINITY, LOG2_E, fill_rows, for_rows, for_vectors, for_width
from numba_attn.cpu.elementary import exp2, tanh_of_tile
from numba_attn.cpu.emits import emits
from numba_attn.cpu.plan import HEIGHTS, WIDEST
from numba_attn.cpu.products import ahead_of, are_pairs, ask_for_rows, product, product_of_heads
from numba_attn.cpu.simd import I1, I32, I64, Value, Vectors
from numba_attn.cpu.softmax import accept, times_log
from numba_attn.cpu.target import MANY_REGISTERS

Exponents = tuple[list[Value], list[Value]]  # of a few keys, and which lanes are masked, if any are


def _scores(v, width, k, k_row, k_step, n, D, qt, s, ahead, ahead_size):
    """s = k.qt; the n rows of D elements that begin `ahead`, of so many bytes each, are asked for."""
    row, pairs = width * v.bytes, are_pairs(v, "k")
    if pairs and target.BFLOAT16 == "amx":
        amx.product(v, k, k_row, qt, width, n, D, s, adding=False)
        return

    def tile(i: Value, height: int) -> None:
        asked, keys = ahead_of(v, (ahead, ahead_size), v.mul_index(i, D), height, width), v.at(k, v.mul_index(i, k_row))
        acc = product_of_heads(v, keys, k_row, k_step, qt, D, height, width, pairs, ahead=asked)
        s_i = v.at(s, v.mul_index(i, row))
        for x in range(height * width):
            v.store(acc[x], s_i, x * v.bytes)

    for_rows(v, n, HEIGHTS[width], tile)


def _probabilities(
    v, width, k, k_row, k_step, n, D, qt, scale, reference, best, total, sums, top, p, ahead, ahead_size
):  # fmt: skip
    """p = exp2(scale * k.qt - reference) and total += its column sums, without the scores ever being stored.

    top = the largest exponent of each query, and best the largest score so far.  Returns whether every reference will
    do for it; else best and total are as they were, and the tile is to be done again by way of `scores`.  The
    arithmetic is that of `scores` and `exponentiate`.  The n rows of D elements that begin `ahead`, of so many bytes
    each, are asked for.
    """
    exponents = _plain_exponents(v, scale)
    return _exponentials(
        v, width, k, k_row, k_step, n, D, qt, exponents, reference, best, total, sums, top, p, (ahead, ahead_size)
    )  # fmt: skip


def _weighted_probabilities(
    v, width, k, k_row, k_step, n, D, qt, scale, reference, best, total, sums, top, p, moment, moments, ahead,
    ahead_size,
):  # fmt: skip
    """The same for the widest blocks, and moment += the column sums of p * log2(p)."""
    exponents, tile_moment = _plain_exponents(v, scale), (moment, moments)
    return _exponentials(
        v, width, k, k_row, k_step, n, D, qt, exponents, reference, best, total, sums, top, p, (ahead, ahead_size),
        tile_moment,
    )  # fmt: skip


def _plain_exponents(v: Vectors, scale: Value) -> Callable[..., Exponents]:
    factor = v.splat(scale)

    def exponents(products: list[Value], base: Value, _: list[tuple[Value, Value]]) -> Exponents:
        base = v.sub(v.constant(0.0), base)
        return [v.fma(x, factor, base) for x in products], []

    return exponents


def _biased_probabilities(
    v, width, row, k, k_row, k_step, n, D, qt, scale, bias, bias_row, reference, sums, top, p, ahead, ahead_size
):  # fmt: skip
    """The same for exponents of scale * k.qt + bias - reference, of a part of a tile: p = -0.0 where the bias is -inf.

    Rows of qt and p are `row` bytes apart, as some vectors of the block may not be in it.  The part is added to sums
    and top, which `softmax.take_in` then looks at.
    """
    factor, lowest = v.splat(scale), v.constant(-INFINITY)

    def exponents(products: list[Value], base: Value, at: list[tuple[Value, Value]]) -> Exponents:
        extra = [v.load(v.at(bias, v.add_index(v.mul_index(key, bias_row), here))) for key, here in at]
        xs = [v.fma(x, factor, v.sub(e, base)) for x, e in zip(products, extra, strict=True)]
        return xs, [v.equal(e, lowest) for e in extra]

    # Where registers are few, sums would make room for the addresses of what comes next.
    later = (ahead, ahead_size) if MANY_REGISTERS else None
    _exponentials_of_part(v, width, row, k, k_row, k_step, n, D, qt, exponents, reference, sums, top, p, ahead=later)


def _sloped_probabilities(
    v, width, k, k_row, k_step, n, D, qt, scale, slope, first, reference, best, total, sums, top, p, ahead, ahead_size
):  # fmt: skip
    """The widest blocks' for exponents of scale * k.qt - slope * |distance| - reference, see `mask_tiles.add_alibi`."""
    factor, minus = v.splat(scale), v.splat(v.builder.fneg(slope))
    lanes = ir.Constant(v.type, [float(lane) for lane in range(v.lanes)])

    def exponents(products: list[Value], base: Value, at: list[tuple[Value, Value]]) -> Exponents:
        (key, here), *_ = at
        ahead = v.builder.sub(v.add_index(first, v.builder.sdiv(here, v.index(v.size))), key)
        distance = v.add(v.splat(v.builder.sitofp(ahead, v.element)), lanes)
        sizes = [v.absolute(v.sub(distance, v.constant(float(r)))) for r in range(len(at))]
        extra = [v.fma(x, minus, v.constant(0.0)) for x in sizes]
        return [v.fma(x, factor, v.sub(e, base)) for x, e in zip(products, extra, strict=True)], []

    return _exponentials(
        v, width, k, k_row, k_step, n, D, qt, exponents, reference, best, total, sums, top, p, (ahead, ahead_size)
    )  # fmt: skip


def _capped_probabilities(
    v, width, k, k_row, k_step, n, D, qt, scale, softcap, reference, best, total, sums, top, p, ahead, ahead_size
):  # fmt: skip
    """The widest blocks' for scores that `cap` would change first, and no bias."""
    steepness = v.builder.fdiv(scale, softcap)
    factor = v.splat(v.builder.fmul(softcap, v.number(LOG2_E)))

    def exponents(products: list[Value], base: Value, _: list[tuple[Value, Value]]) -> Exponents:
        base = v.sub(v.constant(0.0), base)
        return [v.fma(y, factor, base) for y in products], []

    return _exponentials(
        v, width, k, k_row, k_step, n, D, qt, exponents, reference, best, total, sums, top, p, (ahead, ahead_size),
        change=partial(tanh_of_tile, v, steepness),
    )  # fmt: skip


def _exponentials(
    v, width, k, k_row, k_step, n, D, qt, exponents_of, reference, best, total, sums, top, p, ahead, moment=None,
    change=None,
):  # fmt: skip
    """Of `_probabilities`, for exponents as `exponents_of` makes them of a few products.

    It gets the reference, and the number of the key and the vector's place in a row of each product.  With a `moment`
    it and what is added to it by this tile are as in `exponentiate`.  All products of a register tile go through
    `change` first.
    """
    for w in range(width):
        v.store(v.constant(-INFINITY), top, w * v.bytes)
        v.store(v.constant(0.0), sums, w * v.bytes)
        if moment is not None:
            v.store(v.constant(0.0), moment[1], w * v.bytes)
    row, moments = v.index(width * v.bytes), None if moment is None else moment[1]
    _exponentials_of_part(
        v, width, row, k, k_row, k_step, n, D, qt, exponents_of, reference, sums, top, p, moments, ahead, change
    )
    added = [(total, sums), *([] if moment is None else [moment])]
    return accept(v, v.index(width), top, reference, best, added, ir.Constant(I1, 0))


def _exponentials_of_part(
    v, width, row, k, k_row, k_step, n, D, qt, exponents_of, reference, sums, top, p, moments=None, ahead=None,
    change=None,
):  # fmt: skip
    """Of `_exponentials`, for n keys and the vectors that are wanted of blocks with rows of so many bytes."""
    pairs = are_pairs(v, "k")
    on_tiles = pairs and target.BFLOAT16 == "amx"
    # Exponentials are most of the code: the widest register tiles have one height, what is left are single keys.
    heights = list(HEIGHTS[width]) if width < WIDEST else [HEIGHTS[width][0], 1]
    if pairs:  # pairs of keys are side by side in p
        heights = [*([AT_ONCE] if on_tiles else heights[:-1]), 2, 1]
    if on_tiles:
        amx.product(v, k, k_row, qt, width, n, D, p, adding=False)

    def tile(i: Value, height: int) -> None:
        if on_tiles:
            acc = [v.load(v.at(p, v.mul_index(i, row)), x * v.bytes) for x in range(height * width)]
        else:
            if height == HEIGHTS[width][0] and not pairs and MANY_REGISTERS:
                # The next rows: the first block of a task would wait for them.
                ask_for_rows(v, v.at(k, v.mul_index(v.add_index(i, height), k_row)), k_row, D, height)
            asked = ahead_of(v, ahead, v.mul_index(i, D), height, width)
            keys = v.at(k, v.mul_index(i, k_row))
            acc = product_of_heads(v, keys, k_row, k_step, qt, D, height, width, pairs, row, asked)
        acc = change(acc) if change else acc
        p_i = v.at(p, v.mul_index(v.half(i) if pairs else i, row))
        for w in range(width):
            base = v.load(reference, w * v.bytes)
            highest, total_p = v.load(top, w * v.bytes), v.load(sums, w * v.bytes)
            weighted = None if moments is None else v.load(moments, w * v.bytes)
            for first in range(0, height, AT_ONCE):
                rows = range(first, min(first + AT_ONCE, height))
                at = [(v.add_index(i, r), v.index(w * v.bytes)) for r in rows]
                exponents, masked = exponents_of([acc[r * width + w] for r in rows], base, at)
                for x in exponents:
                    # Where masked, x is -inf or NaN, which is not the maximum.
                    highest = v.maximum(x, highest)
                powers = exp2(v, *exponents)
                for r, is_masked in enumerate(masked):
                    powers[r] = v.select(is_masked, v.constant(-0.0), powers[r])
                for x, power in zip(exponents, powers, strict=True):
                    total_p = v.add(total_p, power)
                    if weighted is not None:
                        weighted = v.add(weighted, times_log(v, power, x))
                if pairs:
                    powers = paired(v, powers)
                for r, power in enumerate(powers, first // 2 if pairs else first):
                    v.store(power, v.at(p_i, v.mul_index(row, r)), w * v.bytes)
            v.store(highest, top, w * v.bytes)
            v.store(total_p, sums, w * v.bytes)
            if moments is not None:
                v.store(weighted, moments, w * v.bytes)

    for_rows(v, n, heights, tile)


def paired(v: Vectors, rows: list[Value], pair: Callable[[Value, Value], Value] | None = None) -> list[Value]:
    """Rows of probabilities, two and two, as bfloat16 or as `pair` does it; a last one with a masked key's."""
    rows = [*rows, v.constant(-0.0)] if len(rows) % 2 else rows
    return [(pair or v.pair)(low, high) for low, high in zip(rows[::2], rows[1::2], strict=True)]


def _pair_up(v, width, p, n, k):
    """Rows of p two and two, in place, if the products of keys k are those of pairs."""
    if are_pairs(v, "k"):
        pair_rows(v, width, p, n)


def pair_rows(
    v: Vectors, width: Value, p: Value, n: Value, pair: Callable[[Value, Value], Value] | None = None
) -> None:
    """The n rows of p two and two, in place, see `paired`."""
    row = v.mul_index(width, v.bytes)

    def vector(here: Value) -> None:
        def rows(j: Value, height: int) -> None:
            at = v.at(v.at(p, v.mul_index(j, row)), here)
            (both,) = paired(v, [v.load(at, v.mul_index(row, r)) for r in range(height)], pair)
            v.store(both, v.at(p, v.mul_index(v.half(j), row)), here)

        for_rows(v, n, (2, 1), rows)

    for_vectors(v, width, vector)


def _accumulate(v, width, value, value_row, value_step, Dv, n, p, ot, cuts, ahead, ahead_size):
    """ot += value.T @ p, where some vectors may be masked in some parts of the tile, see `edges`, and are left out.

    The n rows of Dv elements that begin `ahead`, of so many bytes each, are asked for.  Of pairs there is a row more of
    ot, for their sums, but not on tile registers.
    """
    row, pairs = width * v.bytes, are_pairs(v, "value")
    if pairs and target.BFLOAT16 == "amx":
        _accumulate_on_tiles(v, width, value, value_step, Dv, n, p, ot)
        return
    if pairs:
        value_step = v.index(v.size)  # as packed, see `row_block.values_of`: one address does for all rows at once
    bounds = [v.builder.fptosi(v.load_scalar(cuts, i * v.size), I64) for i in range(2 * width)]
    first, last = bounds[width - 1], bounds[width]
    is_whole = v.builder.icmp_signed("==", v.builder.sub(last, first), n)

    def tile(i: Value, height: int) -> None:
        o, values = v.at(ot, v.mul_index(i, row)), v.at(value, v.mul_index(i, value_step))

        def add(acc: list[Value]) -> None:
            for x in range(height * width):
                v.store(v.add(v.load(o, x * v.bytes), acc[x]), o, x * v.bytes)

        def whole() -> None:
            asked = ahead_of(v, (ahead, ahead_size), v.mul_index(i, n), height, width)
            add(product(v, values, value_step, value_row, p, n, height, width, pairs, ahead=asked))

        def in_parts() -> None:
            acc = [v.constant(0.0)] * (height * width)
            for start, stop, first, end in parts_between(bounds):
                number = v.half(start) if pairs else start
                inside = [r * width + w for r in range(height) for w in range(first, end)]
                of_part = product(
                    v, v.at(values, v.mul_index(number, value_row)), value_step, value_row,
                    v.at(v.at(p, v.mul_index(number, row)), first * v.bytes), v.builder.sub(stop, start), height,
                    end - first, pairs, v.index(row), [acc[x] for x in inside],
                )  # fmt: skip
                for x, total in zip(inside, of_part, strict=True):
                    acc[x] = total
            add(acc)

        # Parts of what does not fill the largest register tiles are not worth the code.
        if height == HEIGHTS[width][0] and width > 1:
            v.choose(v.builder.zext(is_whole, I64), {1: whole, 0: in_parts})
        else:
            whole()

    for_rows(v, Dv, HEIGHTS[width], tile)
    if pairs:
        _add_sums(v, v.index(width), n, p, v.at(ot, v.mul_index(Dv, row)))


def _add_sums(v: Vectors, width: Value, n: Value, p: Value, sums: Value) -> None:
    """sums += those of the columns of p (n / 2, width vectors of pairs): of probabilities as they are multiplied.

    In the order of the keys, as all products are: what is masked, here or elsewhere, then changes no bit.
    """
    row, ones, nowhere = v.mul_index(width, v.bytes), v.room(1), v.index(0)
    v.store(ir.Constant(v.bits, [0x3F803F80] * v.lanes), ones)

    def some(first: Value, vectors: int) -> None:
        here = v.mul_index(first, v.bytes)
        to, columns = v.at(sums, here), v.at(p, here)
        for w, more in enumerate(product(v, ones, nowhere, nowhere, columns, n, 1, vectors, True, row)):
            v.store(v.add(v.load(to, w * v.bytes), more), to, w * v.bytes)

    for_rows(v, width, sorted(HEIGHTS, reverse=True), some)


def parts_between(bounds: list[Value]) -> list[tuple[Value, Value, int, int]]:
    """The keys [start, stop) of each part of a tile, see `edges`, and the vectors [first, end) that are in it."""
    width = len(bounds) // 2
    ranges = [(0, w) for w in range(1, width)] + [(w, width) for w in range(width)]
    return [(*keys, *vectors) for keys, vectors in zip(pairwise(bounds), ranges, strict=True)]


def _mask_vectors(v, width, row, p, n, k):
    """p = -0.0 in `width` vectors of n rows, `row` bytes apart, of keys k."""
    pairs = are_pairs(v, "k")
    masked = ir.Constant(v.bits, [0x80008000] * v.lanes) if pairs else v.constant(-0.0)
    fill_rows(v, width, p, row, v.half(n) if pairs else n, masked)


def _accumulate_on_tiles(
    v: Vectors, width: int, value: Value, value_step: Value, Dv: Value, n: Value, p: Value, ot: Value
) -> None:
    """The same by tile registers."""
    _mask_rest(v, width, n, p)
    amx.product(v, value, value_step, p, width, Dv, n, ot, adding=True)


def _mask_rest(v: Vectors, width: int, n: Value, p: Value) -> None:
    """Pairs of p after those of n keys, to the end of a tile register's: masked, -0.0."""
    row, masked = width * v.bytes, ir.Constant(v.bits, [0x80008000] * v.lanes)
    last = v.mul_index(v.builder.lshr(v.add_index(n, amx.NUMBERS - 1), v.index(5)), amx.ROWS)

    def pair(j: Value, _: list[Value]) -> list[Value]:
        for w in range(width):
            v.store(masked, v.at(p, v.mul_index(j, row)), w * v.bytes)
        return []

    v.loop(v.half(n), last, 1, [], pair)


def _accumulate_carefully(v, width, value, value_row, value_step, Dv, n, p, ot, clean):
    """The same bits, except that the values of masked keys (p = -0.0) are not used even where they are not finite.

    `clean` is memory for the values without those.
    """
    row, pairs = v.mul_index(width, v.bytes), are_pairs(v, "value")
    if pairs and target.BFLOAT16 == "amx":
        amx.add_what_is_not_finite(v, width, value, value_step, Dv, n, p, ot)
        amx.copy_what_is_finite(v, value, value_step, Dv, n, clean)
        v.choose(width, {w: partial(_accumulate_on_tiles, v, w, clean, value_step, Dv, n, p, ot) for w in HEIGHTS})
        return
    b = v.builder

    def word(x: int) -> Value:
        return ir.Constant(v.bits, [x] * v.lanes)

    def attended(x: Value, weight: Value) -> Value:
        """The splat value or pair of values x, with 0 where the weight is that of a masked key."""
        if not pairs:
            return v.select(v.is_negative_zero(weight), v.constant(0.0), x)
        for half in (0xFFFF, 0xFFFF0000):
            is_masked = b.icmp_signed("==", b.and_(weight, word(half)), word(half & 0x80008000))
            x = v.select(is_masked, b.and_(x, word(half ^ 0xFFFFFFFF)), x)
        return x

    def outputs(d: Value, here: Value) -> None:
        o = v.at(v.at(ot, v.mul_index(d, row)), here)

        def key(j: Value, acc: list[Value]) -> list[Value]:
            at = v.at(v.at(value, v.mul_index(d, value_step)), v.mul_index(j, value_row))
            x = v.splat(v.load_scalar(at, element=I32 if pairs else None))
            weight = (v.load_pairs if pairs else v.load)(v.at(p, v.mul_index(j, row)), here)
            return [(v.dot if pairs else v.fma)(attended(x, weight), weight, acc[0])]

        count = v.half(n) if pairs else n
        v.store(v.add(v.load(o), v.loop(0, count, 1, [v.constant(0.0)], key)[0]), o)

    for_vectors(v, width, lambda here: v.each(Dv, lambda d: outputs(d, here)))
    if pairs:
        _add_sums(v, width, n, p, v.at(ot, v.mul_index(Dv, row)))


scores = emits(for_width(_scores), apart=True)
probabilities = emits(for_width(_probabilities), returns=types.boolean, apart=True)
weighted_probabilities = emits(for_width(_weighted_probabilities, [WIDEST]), returns=types.boolean, apart=True)
biased_probabilities = emits(for_width(_biased_probabilities), apart=True)
sloped_probabilities = emits(for_width(_sloped_probabilities, [WIDEST]), returns=types.boolean, apart=True)
capped_probabilities = emits(for_width(_capped_probabilities, [WIDEST]), returns=types.boolean, apart=True)
pair_up = emits(_pair_up)
accumulate = emits(for_width(_accumulate), apart=True)
mask_vectors = emits(_mask_vectors)
accumulate_carefully = emits(_accumulate_carefully)
