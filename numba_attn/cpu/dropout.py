"""Dropout of a tile of probabilities by Philox 4x32-10, as `numba_attn.random` defines it."""

from __future__ import annotations

from llvmlite import ir

from numba_attn.cpu.blocks import for_vectors
from numba_attn.cpu.emits import emits
from numba_attn.cpu.simd import I32, I64, Value, Vectors
from numba_attn.random import MULTIPLIERS, ROUNDS, WEYL

WORDS = 4  # of a block of random numbers: four keys


def _philox(v: Vectors, counter: list[Value], seed: Value) -> list[Value]:
    """Four vectors of random 32-bit words from a vector of counters; `seed` of 64 bits.

    Words are the lower halves of 64-bit lanes all along, with anything in the upper ones: so a multiplication of words
    is one instruction, and its upper half one shift away.
    """
    b = v.builder
    kind, wide = ir.VectorType(I32, v.lanes), ir.VectorType(I64, v.lanes)

    def constant(value: int) -> Value:
        return ir.Constant(wide, [value] * v.lanes)

    def multiply(x: Value, factor: int) -> tuple[Value, Value]:
        product = b.mul(b.and_(x, constant(0xFFFFFFFF)), constant(factor))
        return b.lshr(product, constant(32)), product

    keys = [b.trunc(seed, I32), b.trunc(b.lshr(seed, v.index(32)), I32)]
    x = [b.zext(word, wide) for word in counter]
    for _ in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = multiply(x[0], MULTIPLIERS[0]), multiply(x[2], MULTIPLIERS[1])
        key_0, key_1 = (v.splat(b.zext(key, I64)) for key in keys)
        x = [b.xor(b.xor(high_1, x[1]), key_0), low_1, b.xor(b.xor(high_0, x[3]), key_1), low_0]
        keys = [b.add(key, ir.Constant(I32, weyl)) for key, weyl in zip(keys, WEYL, strict=True)]
    return [b.trunc(word, kind) for word in x]


def _drop(v, width, p, n, threshold, seed, b, h, i, j):
    """p (n, block) = 0 where dropped: -0.0, which is masked, stays; the tile begins with row i and key j.

    The threshold is at least 1 and at most 2**32.
    """
    builder = v.builder
    row = v.mul_index(width, v.bytes)
    kind = ir.VectorType(I32, v.lanes)
    largest_dropped = v.splat(builder.trunc(v.add_index(threshold, -1), I32))
    one, zero = v.constant(1.0), v.constant(0.0)

    def whole(x: Value) -> Value:
        return v.splat(builder.trunc(x, I32))

    def vector(here: Value) -> None:
        lanes = ir.Constant(kind, list(range(v.lanes)))
        first = v.add_index(i, builder.sdiv(here, v.index(v.size)))
        rows = builder.add(whole(first), lanes)

        def group(number: Value, _: list[Value]) -> list[Value]:
            words = _philox(v, [whole(number), rows, whole(h), whole(b)], seed)
            for word, random in enumerate(words):
                key = builder.sub(v.add_index(v.mul_index(number, WORDS), word), j)
                inside = builder.and_(builder.icmp_signed(">=", key, v.index(0)), builder.icmp_signed("<", key, n))
                with builder.if_then(inside):
                    at = v.add_index(v.mul_index(key, row), here)
                    factor = v.select(builder.icmp_unsigned(">", random, largest_dropped), one, zero)
                    v.store(v.mul(v.load(p, at), factor), p, at)
            return []

        last = builder.sdiv(v.add_index(v.add_index(j, n), -1), v.index(WORDS))
        v.loop(builder.sdiv(j, v.index(WORDS)), v.add_index(last, 1), 1, [], group)

    for_vectors(v, width, vector)


drop = emits(_drop)
