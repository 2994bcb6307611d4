"""Conversions of 64-bit integers to float64 in vectors, where the processor has none of its own.

Before AVX-512 there is an instruction for one integer only, and LLVM takes vectors apart for it: half of the time of a
score_mod that uses how far a key is from a query.  So each conversion is written as what does have vectors, exact for
every integer: the upper half, as a multiple of 2**32, is put into the mantissa of a number of 2**84, the lower half
into that of one of 2**52, and the sum of both, less these two numbers, is rounded once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.codegen import JITCodeLibrary

from numba_attn.cpu import target

I64, DOUBLE = ir.IntType(64), ir.DoubleType()
LOWER, UPPER = 0x4330000000000000, 0x4530000080000000  # bits of 2**52, and of 2**84 + 2**63
TOO_MUCH = 2.0**84 + 2.0**63 + 2.0**52


class InVectors(JITCodeLibrary):
    """The code of a function whose conversions are operations that there are vectors of."""

    def add_ir_module(self, ir_module: Any) -> None:
        if target.CONVERTS_ONE_BY_ONE:
            _replace_conversions(ir_module)
        super().add_ir_module(ir_module)


def _replace_conversions(module: ir.Module) -> None:
    for block in [block for function in module.functions for block in function.blocks]:
        for conversion in [x for x in block.instructions if _is_conversion(x)]:
            _replace(block, conversion)


def _is_conversion(x: ir.Instruction) -> bool:
    return bool(x.opname == "sitofp" and x.operands[0].type == I64 and x.type == DOUBLE)


def _replace(block: ir.Block, conversion: ir.Instruction) -> None:
    builder, (integer,) = ir.IRBuilder(), conversion.operands
    builder.position_before(conversion)
    lower = builder.or_(builder.and_(integer, I64(0xFFFFFFFF)), I64(LOWER))
    upper = builder.xor(builder.lshr(integer, I64(32)), I64(UPPER))
    lower, upper = (builder.bitcast(x, DOUBLE) for x in (lower, upper))
    number = builder.fadd(builder.fsub(upper, DOUBLE(TOO_MUCH)), lower)
    block.instructions.remove(number)  # to be put where the conversion is
    block.replace(conversion, number)
