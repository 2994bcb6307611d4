"""The product with the values of a tile that has all keys of its rows, as of short sequences, written finished."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from numba_attn.cpu import narrow
from numba_attn.cpu.blocks import for_rows
from numba_attn.cpu.emits import emits
from numba_attn.cpu.products import are_pairs, product
from numba_attn.cpu.simd import BYTES, I1, I64, Value
from numba_attn.cpu.softmax import share
from numba_attn.cpu.target import MANY_REGISTERS

# Vectors of the output, and rows of them that are accumulated at once.
WHOLE = (
    {4: (6, 4, 2, 1), 2: (12, 4, 2, 1), 1: (8, 4, 2, 1)} if MANY_REGISTERS else {2: (6, 4, 2, 1), 1: (8, 4, 2, 1)}
)  # fmt: skip


def _write_products(v, width, rows, value, value_row, Dv, low, high, p, total, gain, factors, out, out_row):
    """out (rows, Dv) = p.T @ value (n, Dv) * gain / total, of a tile p (n, width vectors) with all keys of the rows.

    A row attends to none but the keys [low, high), for which each lane has a whole number that no later row's is below.

    These are the bits of `tiles.accumulate` and `pack.write_rows`, but nothing is transposed, and rows that fill no
    vector take no longer than they must.  Rows of the value and of the result are contiguous, and Dv is whole vectors.
    `factors` has room for a vector more than those of the queries.  Returns whether some result is not finite.
    """
    if are_pairs(v, "value"):
        return ir.Constant(I1, 0)
    stored, row, zero = v.pointees["out"], v.mul_index(width, v.bytes), v.constant(0.0)

    def factor(w: Value, check: list[Value]) -> list[Value]:
        here = v.mul_index(w, v.bytes)
        sums = v.load(total, here)
        v.store(share(v, sums, gain), factors, here)
        return [v.fma(sums, zero, check[0])]

    v.store(v.loop(0, width, 1, [zero], factor)[0], factors, row)

    def columns(first: Value, vectors: int) -> None:
        values, to = v.at(value, v.mul_index(first, v.bytes)), v.at(out, v.mul_index(first, v.lanes * BYTES[stored]))

        def some(i: Value, height: int) -> None:
            at = v.mul_index(i, v.size)
            start = v.builder.fptosi(v.load_scalar(low, at), I64)
            stop = v.builder.fptosi(v.load_scalar(high, v.add_index(at, (height - 1) * v.size)), I64)
            weights = v.at(v.at(p, at), v.mul_index(start, row))
            first_value, n = v.at(values, v.mul_index(start, value_row)), v.builder.sub(stop, start)
            acc = product(v, weights, v.index(v.size), row, first_value, n, height, vectors, b_row=value_row)
            check = v.load(factors, row)
            for r in range(height):
                weight = v.splat(v.load_scalar(factors, v.add_index(at, r * v.size)))
                line = v.at(to, v.mul_index(out_row, v.add_index(i, r)))
                for x in range(vectors):
                    result = v.mul(v.add(zero, acc[r * vectors + x]), weight)  # from 0, where sums over tiles begin
                    check = v.fma(result, zero, check)
                    narrow.store(v, result, line, x * v.lanes * BYTES[stored], stored)
            v.store(check, factors, row)

        for_rows(v, rows, WHOLE[vectors], some)

    for_rows(v, v.builder.sdiv(Dv, v.index(v.lanes)), [*WHOLE], columns)
    check = v.load(factors, row)
    return v.any(v.builder.fcmp_unordered("uno", check, check))


write_products = emits(_write_products, returns=types.boolean, apart=True)
