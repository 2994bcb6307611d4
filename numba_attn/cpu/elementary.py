"""Powers of two and hyperbolic tangents of vectors.

Several vectors are done at once, step by step: one after the other, their long chains of dependent operations fill the
processor's scheduler and stall it.  Where a register's lanes can be made of another's in any order, tables in registers
shorten the polynomials.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numpy.polynomial import chebyshev

from numba_attn.cpu.blocks import AT_ONCE
from numba_attn.cpu.simd import Value, Vectors

INTERVALS = 32


# Powers of two --------------------------------------------------------------------------------------------------------


@functools.cache
def exp2_polynomial(degree: int, entries: int = 1) -> list[float]:
    """Coefficients, constant first, of a near-minimax 2**f on [-1/2, 1/2] / entries with value exactly 1 at 0.

    1 + f * q(f), with q the Chebyshev series of (2**f - 1) / f, cut off.  The exact 1 makes exp2 exact at integers, so
    that a running maximum that did not move rescales by exactly one.
    """
    half, terms = 1 / (2 * entries), range(degree + 12)
    taylor = [math.log(2) ** (k + 1) / math.factorial(k + 1) * half**k for k in terms]
    q = chebyshev.cheb2poly(chebyshev.poly2cheb(taylor)[:degree])
    return [1.0, *(float(c) / half**k for k, c in enumerate(q))]


def exp2(v: Vectors, *xs: Value) -> list[Value]:
    """2**x of several vectors: a polynomial on the fraction, the exponent added as an integer.

    Exactly 0 below a limit, far enough from the smallest normal number that products with what comes above it are
    normal too: others take a processor a hundred times as long.  NaN stays NaN; x must stay below the largest exponent.
    """
    b = v.builder
    entries = v.lanes_of_one_register()
    shift, limit = (23, -100.0) if v.size == 4 else (52, -960.0)
    degree = {(4, 1): 6, (8, 1): 11, (4, 8): 3, (4, 16): 3, (8, 8): 7}[v.size, entries]
    shift -= entries.bit_length() - 1
    # 2**(i / entries), with i taken off where adding the exponent will put it.
    roots = np.exp2(np.arange(entries) / entries).astype(f"f{v.size}").view(f"i{v.size}")
    roots = (roots - (np.arange(entries, dtype=roots.dtype) << shift)).view(f"f{v.size}")
    polynomial = exp2_polynomial(degree, entries)
    at_limit, magic, *coefficients, at_roots = v.in_memory(
        "exp2", [limit, 1.5 * 2.0**shift, *polynomial, np.resize(roots, v.lanes).tolist()]
    )
    low = at_limit()
    # What comes of these has no meaning, and 0 is put in its place last: a part of the last operation with AVX-512.
    below = [v.less(x, low) for x in xs]
    # Adding 1.5 * 2**shift rounds to a multiple of 1 / entries and leaves it in the lowest mantissa bits.
    rounder = magic()
    shifted = [v.add(x, rounder) for x in xs]
    whole = [v.sub(x, rounder) for x in shifted]
    fraction = [v.sub(x, n) for x, n in zip(xs, whole, strict=True)]
    shifts = ir.Constant(v.bits, [shift] * v.lanes)
    numbers = [b.bitcast(x, v.bits) for x in shifted]
    exponents = [b.shl(n, shifts) for n in numbers]
    if entries > 1:
        chosen = at_roots()
        steps = [b.add(b.bitcast(v.permute(chosen, n), v.bits), e) for n, e in zip(numbers, exponents, strict=True)]
        steps = [b.bitcast(step, v.type) for step in steps]
        growth = [v.mul(f, q) for f, q in zip(fraction, _horner(v, coefficients[1:], fraction), strict=True)]
        powers = [v.fma(step, g, step) for step, g in zip(steps, growth, strict=True)]
    else:
        square = [v.mul(f, f) for f in fraction]
        # Even and odd powers apart: half the depth of Horner's rule for one multiplication.
        even, odd = (_horner(v, coefficients[start::2], square) for start in (0, 1))
        power = [v.fma(o, f, e) for o, f, e in zip(odd, fraction, even, strict=True)]
        bits = [b.add(b.bitcast(p, v.bits), n) for p, n in zip(power, exponents, strict=True)]
        powers = [b.bitcast(x, v.type) for x in bits]
    return [v.select(x, v.constant(0.0), power) for x, power in zip(below, powers, strict=True)]


# Hyperbolic tangents --------------------------------------------------------------------------------------------------


def tanh(v: Vectors, factor: Value, *xs: Value) -> list[Value]:
    """Hyperbolic tangent of factor * x, for several vectors, to a few units in the last place, of tiny ones too."""
    by_table = (v.size, v.lanes_of_one_register()) == (4, INTERVALS // 2)
    return (_tanh_by_table if by_table else _tanh_by_exp2)(v, factor, *xs)


def tanh_in_place(v: Vectors, factor: Value, at: Value, count: int | Value) -> None:
    """`tanh` of so many vectors in memory."""
    start, count = v.index(0), v.index(count)
    for at_once in (AT_ONCE, 1):

        def some(first: Value, _: list[Value], at_once: int = at_once) -> list[Value]:
            here = v.at(at, v.mul_index(first, v.bytes))
            for i, y in enumerate(tanh(v, factor, *(v.load(here, i * v.bytes) for i in range(at_once)))):
                v.store(y, here, i * v.bytes)
            return []

        stop = v.whole_steps(start, count, at_once)
        v.loop(start, stop, at_once, [], some, rolled=True)
        start = stop


def tanh_of_tile(v: Vectors, factor: Value, xs: Sequence[Value]) -> list[Value]:
    """`tanh` of the vectors of a register tile, through memory.

    Beside all of them the constants of one and the steps of a few do not fit into registers, and what LLVM then keeps
    on the stack takes longer than to write each vector once, and once its tangent.
    """
    kept = v.room(len(xs))
    for i, x in enumerate(xs):
        v.store(x, kept, i * v.bytes)
    tanh_in_place(v, factor, kept, len(xs))
    return [v.load(kept, i * v.bytes) for i in range(len(xs))]


@functools.cache
def tanh_polynomials(degree: int = 4) -> tuple[float, np.ndarray]:
    """The width of 32 intervals from 0 to where single precision has 1, and polynomials in each for tanh(y) / y.

    (32, degree + 1) coefficients, constant first, of the distance from the interval's centre; that of the first is 0.
    """
    width = float(np.float32(9.02 / (INTERVALS - 0.5)))
    nodes = chebyshev.chebpts1(degree + 1)
    table = np.empty((INTERVALS, degree + 1))
    for i, row in enumerate(table):
        low, high = max((i - 0.5) * width, 0.0), (i + 0.5) * width
        y = (low + high) / 2 + (high - low) / 2 * nodes
        row[:] = np.polynomial.polynomial.polyfit(y - i * width, np.tanh(y) / y, degree)
    return width, table


def _tanh_by_table(v: Vectors, factor: Value, *xs: Value) -> list[Value]:
    """By a polynomial of |y|, for y = factor * x, whose coefficients are lanes of two registers each."""
    b = v.builder
    width, table = tanh_polynomials()
    halves = [half.tolist() for column in table.T for half in np.split(column, 2)]
    # The largest |y| is still in the last interval when it has been rounded.
    magic, per_width, minus_width, largest, *coefficients = v.in_memory(
        "tanh", [1.5 * 2.0**23, 1 / width, -width, (INTERVALS - 0.51) * width, *halves]
    )
    steepness = v.splat(_finite(v, factor))
    ys = [v.mul(x, steepness) for x in xs]
    most, rounder, per, minus = largest(), magic(), per_width(), minus_width()
    sizes = [v.absolute(y) for y in ys]
    sizes = [v.select(v.less(most, y), most, y) for y in sizes]  # NaN stays
    shifted = [v.fma(y, per, rounder) for y in sizes]
    centres = [v.sub(n, rounder) for n in shifted]
    offsets = [v.fma(n, minus, y) for n, y in zip(centres, sizes, strict=True)]
    numbers = [b.bitcast(n, v.bits) for n in shifted]
    values: list[Value] = []
    for of_lower, of_upper in reversed(list(zip(coefficients[::2], coefficients[1::2], strict=True))):
        lower, upper = of_lower(), of_upper()
        chosen = [v.permute_two(lower, upper, n) for n in numbers]
        values = [v.fma(p, t, c) for p, t, c in zip(values, offsets, chosen, strict=True)] if values else chosen
    return [v.with_sign(v.mul(size, p), y) for size, p, y in zip(sizes, values, ys, strict=True)]


def _tanh_by_exp2(v: Vectors, factor: Value, *xs: Value) -> list[Value]:
    """With expm1(2 y) = e: e / (e + 2).

    And with 2 y log2(e) = n + f, where 2**f - 1 = f * q(f) loses nothing, e = 2**n * (f * q(f)) + (2**n - 1).
    """
    b = v.builder
    shift, largest, bias, degree = (23, 40.0, 127, 6) if v.size == 4 else (52, 80.0, 1023, 11)
    magic, *coefficients = v.in_memory("tanh", [1.5 * 2.0**shift, *exp2_polynomial(degree)[1:]])
    scaled, limit = _within(v, b.fmul(factor, v.number(2 / math.log(2))), largest)
    high, low, steepness, rounder = v.splat(limit), v.splat(b.fneg(limit)), v.splat(scaled), magic()
    # NaN stays: the comparisons do not hold.
    clamped = [v.select(v.less(high, x), high, x) for x in xs]
    clamped = [v.select(v.less(x, low), low, x) for x in clamped]
    shifted = [v.fma(x, steepness, rounder) for x in clamped]
    minus_whole = [v.sub(rounder, n) for n in shifted]
    fraction = [v.fma(x, steepness, n) for x, n in zip(clamped, minus_whole, strict=True)]
    growth = [v.mul(f, q) for f, q in zip(fraction, _horner(v, coefficients, fraction), strict=True)]
    shifts, one = (ir.Constant(v.bits, [c] * v.lanes) for c in (shift, bias << shift))
    powers = [b.bitcast(b.add(b.shl(b.bitcast(n, v.bits), shifts), one), v.type) for n in shifted]
    e = [v.fma(p, g, v.sub(p, v.constant(1.0))) for p, g in zip(powers, growth, strict=True)]
    return [v.div(x, v.add(x, v.constant(2.0))) for x in e]


def _finite(v: Vectors, factor: Value) -> Value:
    """The nearest finite number: products of infinity with 0 would be NaN."""
    b, largest = v.builder, v.number(v.largest)
    factor = b.select(b.fcmp_ordered("<", largest, factor), largest, factor)
    return b.select(b.fcmp_ordered("<", factor, b.fneg(largest)), b.fneg(largest), factor)


def _within(v: Vectors, factor: Value, most: float) -> tuple[Value, Value]:
    """A finite factor, and the x for which factor * x is as large as `most`.

    That is infinity for a factor of 0, whose products with infinity stay NaN, and for no other.
    """
    b, largest, zero = v.builder, v.number(v.largest), v.number(0.0)
    factor = _finite(v, factor)
    size = b.select(b.fcmp_ordered("<", factor, zero), b.fneg(factor), factor)
    limit = b.fdiv(v.number(most), size)
    too_large = b.and_(b.fcmp_ordered("<", largest, limit), b.fcmp_ordered("<", zero, size))
    return factor, b.select(too_large, largest, limit)


def _horner(v: Vectors, coefficients: Sequence[Callable[[], Value]], xs: Sequence[Value]) -> list[Value]:
    """A polynomial, constant first, of several vectors."""
    values = [coefficients[-1]()] * len(xs)
    for coefficient in reversed(coefficients[:-1]):
        c = coefficient()
        values = [v.fma(value, x, c) for value, x in zip(values, xs, strict=True)]
    return values
