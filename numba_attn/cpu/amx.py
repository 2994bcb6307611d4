"""Products of bfloat16 numbers on the tile registers of AMX, 16 x 16 sums at a time.

A tile has 16 rows of 64 bytes.  Of a product, the left operand has 32 consecutive numbers in a row, the right one 16
pairs; so keys as they are, and queries and probabilities in pairs, are operands.  Two by two tiles of sums are kept in
registers.  LLVM knows nothing of what the tile registers hold: all that is done with them is spelled out here.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from numba_attn.cpu.emits import emits
from numba_attn.cpu.simd import I1, I8, I16, I32, Value, Vectors

ROWS = 16  # of a tile
ROW_BYTES = 64
NUMBERS = 32  # bfloat16 numbers of a row
SUMS, LEFT, RIGHT = range(4), (4, 5), (6, 7)  # the registers


def _assembly(v: Vectors, text: str, *values: Value) -> None:
    pointer = I8.as_pointer()
    values = tuple(v.builder.bitcast(x, pointer) if isinstance(x.type, ir.PointerType) else x for x in values)
    kind = ir.FunctionType(ir.VoidType(), [x.type for x in values])
    v.builder.asm(kind, text, ",".join([*["r"] * len(values), "~{memory}"]), list(values), True)


def _configure(v, memory):
    """Make all tile registers 16 rows of 64 bytes; they are released by `release`."""
    palette, rows = [1, *[0] * 15], [ROWS] * 8
    widths = [byte for _ in range(8) for byte in (ROW_BYTES, 0)]
    content = [*palette, *widths, *[0] * 16, *rows, *[0] * 8]
    kind, module, name = ir.ArrayType(I8, len(content)), v.builder.module, "numba_attn.tile_configuration"
    if name not in module.globals:
        table = ir.GlobalVariable(module, kind, name)
        table.linkage, table.global_constant, table.align = "internal", True, ROW_BYTES
        table.initializer = ir.Constant(kind, content)
    _assembly(v, "ldtilecfg ($0)", module.globals[name])


def _release(v, memory):
    _assembly(v, "tilerelease")


def _tiles(
    v: Vectors,
    rows: int,
    columns: int,
    a: Value,
    a_row: Value,
    b: Value,
    b_row: Value,
    steps: Value,
    c: Value,
    c_row: Value,
    adding: bool,
) -> None:
    """c (rows x columns tiles) = a.b, or += it; a and b have `steps` tiles along the sum."""
    below_a, below_b, below_c = (v.mul_index(stride, ROWS) for stride in (a_row, b_row, c_row))
    places = [v.at(v.at(c, v.mul_index(below_c, r)), q * ROW_BYTES) for r in range(rows) for q in range(columns)]
    for register, place in zip(SUMS, places, strict=False):
        if adding:
            _assembly(v, f"tileloadd ($0,$1,1), %tmm{register}", place, c_row)
        else:
            _assembly(v, f"tilezero %tmm{register}")

    def step(_: Value, at: list[Value]) -> list[Value]:
        left, right = at
        for r in range(rows):
            _assembly(v, f"tileloadd ($0,$1,1), %tmm{LEFT[r]}", v.at(left, v.mul_index(below_a, r)), a_row)
        for q in range(columns):
            _assembly(v, f"tileloadd ($0,$1,1), %tmm{RIGHT[q]}", v.at(right, q * ROW_BYTES), b_row)
        for r in range(rows):
            for q in range(columns):
                _assembly(v, f"tdpbf16ps %tmm{RIGHT[q]}, %tmm{LEFT[r]}, %tmm{SUMS[r * columns + q]}")
        return [v.at(left, ROW_BYTES), v.at(right, below_b)]

    v.loop(0, steps, 1, [a, b], step, rolled=True)
    for register, place in zip(SUMS, places, strict=False):
        _assembly(v, f"tilestored %tmm{register}, ($0,$1,1)", place, c_row)


def product(
    v: Vectors, a: Value, a_row: Value, b: Value, width: int, m: Value, count: Value, c: Value, adding: bool
) -> None:
    """c (m, width vectors) = a.b, or += it: a (m, count) numbers, b (half of count, width vectors) pairs.

    m is rounded up to whole tiles, and count to whole rows of them: a, b and c must have room for that, and a or b
    hold 0 beyond count, with nothing that is not finite opposite.
    """
    row = v.index(width * v.bytes)
    steps = v.builder.lshr(v.add_index(count, NUMBERS - 1), v.index(5))
    strips = v.builder.lshr(v.add_index(m, ROWS - 1), v.index(4))

    def strip(i: Value, rows: int) -> None:
        first = v.mul_index(i, ROWS)
        for w in range(0, width, 2):
            columns = min(2, width - w)
            _tiles(
                v, rows, columns, v.at(a, v.mul_index(first, a_row)), a_row, v.at(b, w * v.bytes), row, steps,
                v.at(v.at(c, v.mul_index(first, row)), w * v.bytes), row, adding,
            )  # fmt: skip

    _in_twos(v, strips, strip)


def _in_twos(v: Vectors, count: Value, body: Callable[[Value, int], None]) -> None:
    whole = v.whole_steps(v.index(0), count, 2)
    for start, stop, step in ((v.index(0), whole, 2), (whole, count, 1)):

        def one(i: Value, _: list[Value], step: int = step) -> list[Value]:
            body(i, step)
            return []

        v.loop(start, stop, step, [], one)


def _not_finite(b: ir.IRBuilder, bits: Value) -> Value:
    """Of bits of bfloat16 numbers."""
    kind = bits.type
    exponent = ir.Constant(kind, [0x7F80] * kind.count if isinstance(kind, ir.VectorType) else 0x7F80)
    return b.icmp_unsigned("==", b.and_(bits, exponent), exponent)


def add_what_is_not_finite(
    v: Vectors, width: Value, value: Value, value_step: Value, Dv: Value, n: Value, p: Value, ot: Value
) -> None:
    """ot += p * value for the values that are not finite, where keys are not masked (p = -0.0)."""
    b, row = v.builder, v.mul_index(width, v.bytes)
    high, low, masked = (ir.Constant(v.bits, [x] * v.lanes) for x in (0xFFFF0000, 16, 0x80000000))

    def add(d: Value, j: Value, bits: Value) -> None:
        x = v.splat(b.bitcast(b.shl(b.zext(bits, I32), ir.Constant(I32, 16)), v.element))
        pairs_of_key = v.at(p, v.mul_index(b.lshr(j, v.index(1)), row))
        odd = b.trunc(b.and_(j, v.index(1)), I1)
        o = v.at(ot, v.mul_index(d, row))

        def vector(here: Value) -> None:
            pair = v.load_pairs(pairs_of_key, here)
            weight = b.select(odd, b.and_(pair, high), b.shl(pair, low))
            old = v.load(o, here)
            new = v.fma(b.bitcast(weight, v.type), x, old)
            v.store(v.select(b.icmp_unsigned("==", weight, masked), old, new), o, here)

        v.each(width, lambda w: vector(v.mul_index(w, v.bytes)))

    def element(d: Value, j: Value) -> None:
        at = v.at(v.at(value, v.mul_index(d, value_step)), v.mul_index(j, 2))
        bits = b.load(at, align=1, typ=I16)
        with b.if_then(_not_finite(b, bits), likely=False):
            add(d, j, bits)

    v.each(Dv, lambda d: v.each(n, lambda j: element(d, j)))


def copy_what_is_finite(v: Vectors, value: Value, value_step: Value, Dv: Value, n: Value, clean: Value) -> None:
    """clean = value, with 0 for what is not finite; both (Dv, whole tile rows), rows value_step bytes apart."""
    b, kind = v.builder, ir.VectorType(I16, NUMBERS)
    rows = v.mul_index(b.lshr(v.add_index(Dv, ROWS - 1), v.index(4)), ROWS)
    end = v.mul_index(b.lshr(v.add_index(n, NUMBERS - 1), v.index(5)), ROW_BYTES)

    def part(d: Value, at: Value) -> None:
        offset = v.add_index(v.mul_index(d, value_step), at)
        x = b.load(v.at(value, offset), align=1, typ=kind)
        v.store(b.select(_not_finite(b, x), ir.Constant(kind, None), x), v.at(clean, offset))

    def row(d: Value) -> None:
        def step(at: Value, _: list[Value]) -> list[Value]:
            part(d, at)
            return []

        v.loop(0, end, ROW_BYTES, [], step)

    v.each(rows, row)


configure = emits(_configure)
release = emits(_release)
