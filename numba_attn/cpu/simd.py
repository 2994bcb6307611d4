"""A vector vocabulary on LLVM IR, in which the register tiles of `products.py` read like the mathematics.

`Vectors` appends operations on vectors of one element type and one width to an IR builder; `emits` has functions that
use it called from Numba-compiled code.  Only generic vector IR is emitted (arithmetic, `llvm.fma`, shuffles, selects):
LLVM legalises it for any processor, and a wide vector is still right, if slow, on a narrow one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from numba_attn.cpu import target

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
# Two numbers of 16 bits, the first in the low half, as Numba sees them: the operands of `dot` and of `dot_words`.
PAIRS = types.uint32  # bfloat16
WORDS = types.int32  # integers
BYTES = {
    types.boolean: 1,
    types.int8: 1,
    types.uint8: 1,
    types.int16: 2,
    types.uint16: 2,
    types.int32: 4,
    types.uint32: 4,
    types.int64: 8,
    types.float32: 4,
    types.float64: 8,
}


class BFloat(ir.Type):
    """A type of LLVM's that llvmlite lacks."""

    null = "0.0"
    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


Value = Any  # an ir.Value; llvmlite ships no types


def offset_pointer(builder: ir.IRBuilder, pointer: Value, offset: Value) -> Value:
    return builder.gep(pointer, [offset], source_etype=I8)


class Vectors:
    """Operations on vectors of `lanes` elements of one Numba float type, appended to `builder`."""

    def __init__(self, builder: ir.IRBuilder, dtype: types.Type, lanes: int):
        self.builder = builder
        self.pointees: dict[str, types.Type] = {}  # of the pointer arguments of what is being emitted, by name
        self.dtype = dtype
        self.lanes = lanes
        self.element = ELEMENTS[dtype]
        self.size = BYTES[dtype]  # bytes of an element
        self.bytes = lanes * self.size
        self.type = ir.VectorType(self.element, lanes)
        self.bits = ir.VectorType(ir.IntType(8 * self.size), lanes)  # the same lanes as integers

    # Constants and scalars ------------------------------------------------------------------------------------------

    def index(self, value: int | Value) -> Value:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def add_index(self, a: int | Value, b: int | Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return ir.Constant(I64, a + b)
        return self.builder.add(self.index(a), self.index(b))

    def mul_index(self, a: int | Value, b: int | Value) -> Value:
        return self.builder.mul(self.index(a), self.index(b))

    def half(self, a: Value) -> Value:
        """Half of a whole number, rounded up."""
        return self.builder.lshr(self.add_index(a, 1), self.index(1))

    def constant(self, value: float) -> Value:
        return ir.Constant(self.type, [self.rounded(value)] * self.lanes)

    def number(self, value: float) -> Value:
        """A scalar constant."""
        return ir.Constant(self.element, self.rounded(value))

    def rounded(self, value: float) -> float:
        """A constant of the element type; LLVM wants single-precision ones as the doubles that they round to."""
        return float(np.float32(value)) if self.size == 4 else value

    @property
    def largest(self) -> float:
        return float(np.finfo(np.float32 if self.size == 4 else np.float64).max)

    def wholes(self, a: Value, size: int) -> Value:
        """How many pieces of a size something is cut into, the last of which may be smaller."""
        return self.builder.sdiv(self.add_index(a, size - 1), self.index(size))

    def least(self, a: Value, b: Value) -> Value:
        """The smaller of two integers."""
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def most(self, a: Value, b: Value) -> Value:
        """The larger of two integers."""
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def beside(self, numbers: Sequence[Value]) -> Value:
        """A vector of a number for each lane."""
        vector = ir.Constant(self.type, ir.Undefined)
        for i, number in enumerate(numbers):
            vector = self.builder.insert_element(vector, number, I32(i))
        return vector

    def splat(self, scalar: Value, lanes: int | None = None) -> Value:
        lanes = lanes or self.lanes
        undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.shuffle(one, one, [0] * lanes)

    # Memory ---------------------------------------------------------------------------------------------------------

    def at(self, pointer: Value, offset: int | Value) -> Value:
        """The address `offset` bytes on."""
        return offset_pointer(self.builder, pointer, self.index(offset))

    def opaque(self, pointer: Value) -> Value:
        """The same address, of which LLVM does not know where it comes from."""
        kind = ir.FunctionType(pointer.type, [pointer.type])
        return self.builder.asm(kind, "", "=r,0", [pointer], False)

    def room(self, count: int) -> Value:
        """Where so many vectors can be kept, on the stack."""
        kept = cgutils.alloca_once(self.builder, ir.ArrayType(I8, count * self.bytes))
        kept.align = self.bytes
        return self.builder.bitcast(kept, I8.as_pointer())

    def load(self, pointer: Value, offset: int | Value = 0) -> Value:
        return self.builder.load(self.at(pointer, offset), align=1, typ=self.type)

    def load_scalar(self, pointer: Value, offset: int | Value = 0, element: ir.Type | None = None) -> Value:
        return self.builder.load(self.at(pointer, offset), align=1, typ=element or self.element)

    def store(self, value: Value, pointer: Value, offset: int | Value = 0) -> None:
        # llvmlite still remembers what a pointer points to, and insists on it in stores.
        self.builder.store(value, self.builder.bitcast(self.at(pointer, offset), value.type.as_pointer()), align=1)

    def prefetch(self, pointer: Value, offset: int | Value = 0, cache: int = target.PREFETCH) -> None:
        """Ask for a cache line to be in a near cache soon, see `target.PREFETCH`; any address will do."""
        # As for stores: one declaration, whatever the pointers point to.
        at, i32 = self.builder.bitcast(self.at(pointer, offset), I8.as_pointer()), partial(ir.Constant, I32)
        kind = ir.FunctionType(ir.VoidType(), [at.type, I32, I32, I32])
        self.builder.call(self._function("llvm.prefetch.p0", kind), [at, i32(0), i32(cache), i32(1)])

    # Arithmetic -----------------------------------------------------------------------------------------------------

    def add(self, a: Value, b: Value) -> Value:
        return self.builder.fadd(a, b)

    def sub(self, a: Value, b: Value) -> Value:
        return self.builder.fsub(a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self.builder.fmul(a, b)

    def div(self, a: Value, b: Value) -> Value:
        return self.builder.fdiv(a, b)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """A * b + c, in one rounding where the processor has it (a library call for every lane elsewhere)."""
        return self._call("llvm.fma" if target.HAS_FMA else "llvm.fmuladd", a, b, c)

    def dot(self, a: Value, b: Value, c: Value) -> Value:
        """a . b + c for pairs of bfloat16 numbers a and b in each lane, which need `target.HAS_BFLOAT16_PAIRS`."""
        halves = ir.VectorType(BFloat(), 2 * self.lanes)
        kind = ir.FunctionType(self.type, [self.type, halves, halves])
        function = self._function("llvm.x86.avx512bf16.dpbf16ps.512", kind)
        return self.builder.call(function, [c, self.builder.bitcast(a, halves), self.builder.bitcast(b, halves)])

    def dot_words(self, a: Value, b: Value, c: Value) -> Value:
        """a . b + c for pairs of integers of 16 bits in each lane, which needs `target.HAS_WORD_PRODUCTS`; exact."""
        halves, words = (ir.VectorType(kind, n * self.lanes) for kind, n in ((I16, 2), (I32, 1)))
        name = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}[self.lanes]
        function = self._function(name, ir.FunctionType(words, [halves, halves]))
        products = self.builder.call(function, [self.builder.bitcast(x, halves) for x in (a, b)])
        return self.builder.add(c, products)

    def pair(self, low: Value, high: Value) -> Value:
        """Pairs of bfloat16 of two vectors of numbers that are not negative, rounded to nearest; -0.0 stays."""
        b = self.builder
        half, upper, shift = (ir.Constant(self.bits, [c] * self.lanes) for c in (0x8000, 0xFFFF0000, 16))
        low, high = (b.add(b.bitcast(x, self.bits), half) for x in (low, high))
        return b.or_(b.lshr(low, shift), b.and_(high, upper))

    def load_pairs(self, pointer: Value, offset: int | Value = 0) -> Value:
        return self.builder.load(self.at(pointer, offset), align=1, typ=self.bits)

    def absolute(self, a: Value) -> Value:
        return self._call("llvm.fabs", a)

    def with_sign(self, a: Value, b: Value) -> Value:
        """|a| with the sign of b."""
        return self._call("llvm.copysign", a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of each lane; `b` where either is NaN.  One instruction on x86."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return self.builder.select(condition, a, b)

    def equal(self, a: Value, b: Value) -> Value:
        return self.builder.fcmp_ordered("==", a, b)

    def less(self, a: Value, b: Value) -> Value:
        return self.builder.fcmp_ordered("<", a, b)

    def is_negative_zero(self, a: Value) -> Value:
        """Whether each lane is -0.0, as the probability of a masked key is, and not 0."""
        zero = self.builder.bitcast(self.constant(-0.0), self.bits)
        return self.builder.icmp_signed("==", self.builder.bitcast(a, self.bits), zero)

    def any(self, condition: Value) -> Value:
        """One bit: whether any lane of a comparison holds."""
        packed = self.builder.bitcast(condition, ir.IntType(self.lanes))
        return self.builder.icmp_unsigned("!=", packed, ir.Constant(packed.type, 0))

    def lanes_of_one_register(self) -> int:
        """Lanes of a vector, if it is a register whose lanes another may be made of in any order; 1 otherwise."""
        any_order = {64: target.HAS_AVX512, 32: target.HAS_AVX2 and self.size == 4}
        return self.lanes if any_order.get(self.bytes, False) else 1

    def permute(self, x: Value, lanes: Value) -> Value:
        """Lane n of the result is the lane of x that the lowest bits of lane n of `lanes` say."""
        kind = ir.FunctionType(self.type, [self.type, self.bits])
        wide = f"avx512.permvar.{'sf' if self.size == 4 else 'df'}.512"
        name = wide if self.bytes == 64 else "avx2.permps"
        return self.builder.call(self._function(f"llvm.x86.{name}", kind), [x, lanes])

    def permute_two(self, x: Value, y: Value, lanes: Value) -> Value:
        """The same of 16 lanes of x and as many of y, of float32 and with AVX-512."""
        kind = ir.FunctionType(self.type, [self.type, self.bits, self.type])
        return self.builder.call(self._function("llvm.x86.avx512.vpermi2var.ps.512", kind), [x, lanes, y])

    def in_memory(self, name: str, rows: Sequence[float | Sequence[float]]) -> list[Callable[[], Value]]:
        """Constants of a function, a whole vector each, that are loaded where they are used: by calling them.

        Constants that LLVM knows it would load before the loops, and then spill: there are more than registers.
        """
        module, kind = self.builder.module, ir.ArrayType(self.type, len(rows))
        name = f"numba_attn.{name}.{self.lanes}.{self.type.element}"
        if name not in module.globals:
            table = ir.GlobalVariable(module, kind, name)
            table.linkage, table.global_constant, table.align = "internal", True, self.bytes
            vectors = [[row] * self.lanes if isinstance(row, float) else row for row in rows]
            table.initializer = ir.Constant(kind, [ir.Constant(self.type, [*map(self.rounded, v)]) for v in vectors])
        table = self.opaque(self.builder.bitcast(module.globals[name], I8.as_pointer()))
        return [partial(self.load, table, i * self.bytes) for i in range(len(rows))]

    # Shuffles -------------------------------------------------------------------------------------------------------

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """`lanes` vectors as the columns of what they were the rows of: swap off-diagonal halves, quarters, ..."""
        n, rows = self.lanes, list(rows)
        step = n // 2
        while step:
            for i in range(n):
                if not i & step:
                    low = [lane if not lane & step else n + lane - step for lane in range(n)]
                    high = [lane + step if not lane & step else n + lane for lane in range(n)]
                    rows[i], rows[i + step] = (
                        self.shuffle(rows[i], rows[i + step], low),
                        self.shuffle(rows[i], rows[i + step], high),
                    )
            step //= 2
        return rows

    # Control --------------------------------------------------------------------------------------------------------

    def loop(
        self,
        start: int | Value,
        stop: int | Value,
        step: int | Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
        rolled: bool = False,
    ) -> list[Value]:
        """`for i in range(start, stop, step): carried = body(i, carried)`, with the carried values in registers.

        LLVM may unroll it unless it is to stay `rolled`.
        """
        b = self.builder
        start, stop, step = self.index(start), self.index(stop), self.index(step)
        before, head = b.block, b.append_basic_block("loop")
        after = b.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", start, stop), head, after)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, before)
        inside = [b.phi(v.type) for v in carried]
        for phi, v in zip(inside, carried, strict=True):
            phi.add_incoming(v, before)
        results = list(body(i, list(inside)))
        following = b.add(i, step)
        i.add_incoming(following, b.block)
        for phi, v in zip(inside, results, strict=True):
            phi.add_incoming(v, b.block)
        last = b.block
        branch = b.cbranch(b.icmp_signed("<", following, stop), head, after)
        if rolled:
            branch.set_metadata("llvm.loop", self._never_unrolled())
        b.position_at_end(after)
        outside = [b.phi(v.type) for v in carried]
        for phi, v, result in zip(outside, carried, results, strict=True):
            phi.add_incoming(v, before)
            phi.add_incoming(result, last)
        return outside

    def _never_unrolled(self) -> Value:
        """Metadata of one loop, of which the first operand is by definition the node itself."""
        module = self.builder.module
        off = module.add_metadata(["llvm.loop.unroll.disable"])
        node = ir.MDValue(module, [off], name=str(len(module.metadata)))
        node.operands = (node, off)
        return node

    def each(self, count: Value, body: Callable[[Value], object]) -> None:
        """`for i in range(count): body(i)`."""

        def step(i: Value, _: list[Value]) -> list[Value]:
            body(i)
            return []

        self.loop(0, count, 1, [], step)

    def choose(self, value: Value, cases: dict[int, Callable[[], Value | None]]) -> Value | None:
        """Run the one of `cases` that an integer names (it must name one), and give what that returns."""
        b = self.builder
        end, results = b.append_basic_block("chosen"), []
        for key, build in cases.items():
            hit, miss = b.append_basic_block("case"), b.append_basic_block("next")
            b.cbranch(b.icmp_signed("==", value, self.index(key)), hit, miss)
            b.position_at_end(hit)
            results.append((build(), b.block))
            b.branch(end)
            b.position_at_end(miss)
        b.unreachable()
        b.position_at_end(end)
        if results[0][0] is None:
            return None
        merged = b.phi(results[0][0].type)
        for result, block in results:
            merged.add_incoming(result, block)
        return merged

    def whole_steps(self, start: Value, stop: Value, step: int) -> Value:
        """The largest start + k * step that is not beyond `stop`."""
        count = self.builder.sdiv(self.builder.sub(stop, start), self.index(step))
        return self.add_index(start, self.mul_index(count, step))

    def _call(self, name: str, *args: Value) -> Value:
        kind = args[0].type
        name = f"{name}.v{kind.count}f{8 * self.size}"
        return self.builder.call(self._function(name, ir.FunctionType(kind, [a.type for a in args])), args)

    def _function(self, name: str, kind: ir.FunctionType) -> Value:
        """A function of LLVM's, declared once a module."""
        module = self.builder.module
        return module.globals.get(name) or ir.Function(module, kind, name)
