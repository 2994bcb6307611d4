"""What rows of K and V are multiplied by where they are read in order, see `rows`: numbers, or 16 bits two and two.

* Numbers, of the type that is computed in; K and V are widened to such.
* Pairs of bfloat16 numbers, for K and V of such: `Vectors.dot`.
* Words, integers of 16 bits, for K and V that are integers: `Vectors.dot_words`, in which sums are exact.  A query row,
  and the probabilities of a row for the keys of a tile, each times the scale of its value, become whole numbers of
  steps: 32767 for the largest, or as many as sums have room for.  So they are rounded far less than to bfloat16.

Where they are two and two, those of a query row and of keys are of two elements, those of probabilities and values of
two keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from llvmlite import ir
from numba import types

from numba_attn.cpu import narrow
from numba_attn.cpu.emits import emits
from numba_attn.cpu.products import are_pairs
from numba_attn.cpu.simd import BYTES, I1, I16, WORDS, Value, Vectors
from numba_attn.cpu.tiles import pair_rows
from numba_attn.cpu.walk import row_at

MOST = 32767  # steps of the largest
SUMMED = 512  # keys whose values are added up as integers, at most
LEAST_STEP = 1e-38  # for what is next to nothing


class Factors(NamedTuple):
    """How products are made and added up."""

    together: int  # elements of a row, or keys, in a lane
    size: int  # bytes of an element of a query row
    zero: Value  # the sum of none
    multiply: Callable[[Value, Value, Value], Value]  # a * b + c
    add: Callable[[Value, Value], Value]  # sums
    as_numbers: Callable[[Value], Value]  # sums


def factors_of(v: Vectors, operand: str) -> Factors:
    """Of a stage, as one of its pointers tells."""
    if v.pointees[operand] == WORDS:
        zero = ir.Constant(v.bits, [0] * v.lanes)
        return Factors(2, 2, zero, v.dot_words, v.builder.add, lambda x: v.builder.sitofp(x, v.type))
    if are_pairs(v, operand):
        return Factors(2, 2, v.constant(0.0), v.dot, v.add, lambda x: x)
    return Factors(1, v.size, v.constant(0.0), v.fma, v.add, lambda x: x)


def powers_of_two(lanes: int) -> list[int]:
    return [1 << i for i in range(lanes.bit_length())]


def scales_of(v: Vectors, rows: list[Value], D: Value, stored: types.Type, height: int) -> Value:
    """The scales of some quantised rows, each in `height` lanes, one row after the other."""
    found, *others = (v.splat(narrow.load_scale(v, row, D, stored)) for row in rows)
    for i, x in enumerate(others, 1):
        found = v.shuffle(found, x, [lane if lane // height != i else v.lanes + lane for lane in range(v.lanes)])
    return found


def widened(v: Vectors, row: Value, d: Value, D: Value, stored: types.Type, count: int = 1) -> list[Value]:
    """So many vectors, a power of two, of the elements of a row of D from d on; of quantised ones without the scale."""
    if BYTES[stored] == 1:
        return narrow.load_integers(v, row, d, D, count * v.lanes, stored)
    places = (v.mul_index(v.add_index(d, i * v.lanes), BYTES[stored]) for i in range(count))
    return [narrow.load(v, row, at, stored) for at in places]


def across(v: Vectors, x: Value, height: int, combine: Callable[[Value, Value], Value]) -> Value:
    """Combine the lanes of each of `height` rows of a vector: the same result in all of them."""
    step = v.lanes // 2
    while step >= height:
        x = combine(x, v.shuffle(x, x, [lane ^ step for lane in range(v.lanes)]))
        step //= 2
    return x


def _room(v: Vectors, held: str) -> int:
    """The sum of as many steps fits, of which each is multiplied by one of the integers that are held."""
    return (1 << 31) // narrow.LARGEST[v.pointees[held]]


def most_of_values(v: Vectors) -> float:
    """Steps of the largest of what values are multiplied by, SUMMED of them at most."""
    return float(min(MOST, _room(v, "value") // SUMMED))


def step_of(v: Vectors, top: Value, check: Value, most: Value) -> tuple[Value, Value]:
    """How many steps 1 is and what a step is, for numbers up to `top`; NaN if the check is not 0."""
    steps = v.div(most, top)
    limit = v.constant(1 / LEAST_STEP)
    steps = v.select(v.less(steps, limit), steps, limit)
    return steps, v.add(v.div(v.constant(1.0), steps), check)


def in_steps(v: Vectors, x: Value, steps: Value) -> Value:
    """The nearest whole number of steps in the lower half of each lane; what is in the other half means nothing."""
    return v.builder.bitcast(v.fma(x, steps, v.constant(1.5 * 2.0**23)), v.bits)


def _two_words(v: Vectors, steps: Value, low: Value, high: Value) -> Value:
    low, high = (in_steps(v, x, steps) for x in (low, high))
    lower, shift = (ir.Constant(v.bits, [c] * v.lanes) for c in (0xFFFF, 16))
    return v.builder.or_(v.builder.and_(low, lower), v.builder.shl(high, shift))


# Stages ---------------------------------------------------------------------------------------------------------------


def _round_queries(v, height, q, k, D, steps):
    """q (height, D), numbers, as words in place, if it is to hold those, and what a step is: of row i in each lane that
    is i modulo `height`.  What they are to be multiplied by is as k.
    """
    if v.pointees["q"] != WORDS:
        return
    b, zero, size = v.builder, v.constant(0.0), 2 * v.lanes
    most = v.least(v.index(MOST), b.sdiv(v.index(_room(v, "k")), v.add_index(D, 1)))
    most = v.splat(b.sitofp(most, v.element))

    def row(r: Value) -> None:
        source, to = (v.at(q, v.mul_index(v.mul_index(r, D), n)) for n in (v.size, 2))

        def largest(d: Value, carried: list[Value]) -> list[Value]:
            x = v.absolute(v.load(source, v.mul_index(d, v.size)))
            return [v.maximum(x, carried[0]), v.fma(x, zero, carried[1])]

        def words(d: Value, _: list[Value]) -> list[Value]:
            x = [in_steps(v, v.load(source, v.mul_index(v.add_index(d, n), v.size)), in_one) for n in (0, v.lanes)]
            both = v.shuffle(*x, range(size))
            v.store(b.trunc(both, ir.VectorType(I16, size)), to, v.mul_index(d, 2))
            return []

        top, check = v.loop(0, D, v.lanes, [zero, zero], largest)
        in_one, step = step_of(v, across(v, top, 1, v.maximum), across(v, check, 1, v.add), most)
        v.loop(0, D, size, [], words)
        v.store(b.extract_element(step, v.index(0)), steps, v.mul_index(r, v.size))

    v.each(height, row)

    def again(lane: Value, _: list[Value]) -> list[Value]:
        same = v.load_scalar(steps, v.mul_index(b.sub(lane, height), v.size))
        v.store(same, steps, v.mul_index(lane, v.size))
        return []

    v.loop(height, v.lanes, 1, [], again)


def _two_keys(v: Vectors, stride: int, p: Value, n: Value, pair: Callable[[Value, Value], Value]) -> None:
    """p (n, stride) two keys and two, in place: (n / 2, stride), a last key with a masked one."""
    if stride == v.lanes:
        pair_rows(v, v.index(1), p, n, pair)
        return
    # A vector has an even number of keys: a half of one comes of it, in the place of the next half.
    low = [i + stride * (i // stride) for i in range(v.lanes // 2)] * 2
    high = [i + stride for i in low]

    def vector(i: Value, _: list[Value]) -> list[Value]:
        x = v.load(p, v.mul_index(i, v.size))
        v.store(pair(v.shuffle(x, x, low), v.shuffle(x, x, high)), p, v.mul_index(v.half(i), v.size))
        return []

    v.loop(0, v.mul_index(n, stride), v.lanes, [], vector)


def _weights_of(v, rows, stride, p, n, value, offsets, Dv, step):
    """Probabilities p (n, stride) of query rows as what values are multiplied by, in place, and of words what a step of
    each row is; but what is in `as_read` takes them as they are.

    Behind the last key, keys of its vector are masked.
    """
    if v.pointees["p"] == WORDS:
        make = partial(_round_weights, v, p=p, n=n, value=value, offsets=offsets, Dv=Dv, step=step)
        wanted = v.builder.icmp_signed("!=", rows, v.index(1))
    elif are_pairs(v, "p"):
        make, wanted = partial(_two_keys, v, p=p, n=n, pair=v.pair), I1(1)
    else:
        return
    with v.builder.if_then(wanted):
        v.choose(stride, {lanes: partial(make, lanes) for lanes in powers_of_two(v.lanes)})


def _round_weights(
    v: Vectors, stride: int, p: Value, n: Value, value: Value, offsets: Value, Dv: Value, step: Value
) -> None:
    keys, last, zero = v.lanes // stride, v.add_index(n, -1), v.constant(0.0)

    def scaled(j: Value, carried: list[Value]) -> list[Value]:
        numbers = [v.least(v.add_index(j, i), last) if i else j for i in range(keys)]
        rows = [row_at(v, value, offsets, number) for number in numbers]
        scales = scales_of(v, rows, Dv, v.pointees["value"], stride)
        at = v.mul_index(j, stride * v.size)
        x = v.load(p, at)
        # The scale of a masked key may be anything.
        x = v.select(v.is_negative_zero(x), zero, v.mul(x, scales))
        v.store(x, p, at)
        return [v.maximum(v.absolute(x), carried[0]), v.fma(x, zero, carried[1])]

    top, check = v.loop(0, n, keys, [zero, zero], scaled)
    most = v.constant(most_of_values(v))
    steps, size = step_of(v, across(v, top, stride, v.maximum), across(v, check, stride, v.add), most)
    _two_keys(v, stride, p, n, partial(_two_words, v, steps))
    v.store(size, step)


round_queries = emits(_round_queries)
weights_of = emits(_weights_of)
