"""Addresses in Numba-compiled code: typed pointers, and what one tells about what it points to.

They are moved by byte offsets with GEP, never through integers: strides of any sign or size, unaligned ones included,
cost nothing, and LLVM keeps track of what a pointer points into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from numba_attn.cpu import target
from numba_attn.cpu.simd import BYTES, I8, I64, PAIRS, WORDS, Value, offset_pointer


@intrinsic
def address(context: Any, array: types.Array) -> Any:
    """Pointer to the first element of an array."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        return context.make_array(signature.args[0])(context, builder, values[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def align_stack(context: Any) -> Any:
    """Make the compiler keep the stack of this function aligned to whole vectors.

    It does so for a variable that needs it, but not for the registers that it spills: half of them would lie across two
    cache lines.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        variable = cgutils.alloca_once(builder, ir.ArrayType(I8, target.VECTOR_BYTES))
        variable.align = target.VECTOR_BYTES
        builder.asm(ir.FunctionType(ir.VoidType(), [variable.type]), "", "r", [variable], True)
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def moved(context: Any, pointer: types.CPointer, offset: types.Integer) -> Any:
    """The pointer `offset` bytes on."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        return offset_pointer(builder, *values)

    return pointer(pointer, types.int64), codegen


@intrinsic
def as_element(context: Any, pointer: types.CPointer, array: types.Array) -> Any:
    """The pointer as one to elements of the array's type."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        return builder.bitcast(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(array.dtype)(pointer, array), codegen


@intrinsic
def as_factor(context: Any, pointer: types.CPointer, keys: types.Array, operands: types.Array) -> Any:
    """The pointer as one to what keys are multiplied by: operands of two numbers, if keys are such in memory."""
    in_memory = {PAIRS: [types.uint16], WORDS: [types.int8, types.uint8]}.get(operands.dtype, ())
    kind = types.CPointer(operands.dtype) if keys.dtype in in_memory else pointer

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        return builder.bitcast(values[0], context.get_value_type(signature.return_type))

    return kind(pointer, keys, operands), codegen


@intrinsic
def as_plain(context: Any, pointer: types.CPointer, rows: types.CPointer, memory: types.Array) -> Any:
    """The pointer as one to what `stored.gather` makes of rows: numbers of the memory's type, if they are quantised."""
    kind = types.CPointer(memory.dtype) if BYTES[rows.dtype] == 1 else rows

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        return builder.bitcast(values[0], context.get_value_type(signature.return_type))

    return kind(pointer, rows, memory), codegen


@intrinsic
def put(context: Any, pointer: types.CPointer, offset: types.Integer, value: types.Float) -> Any:
    """Write a number `offset` bytes on, at any alignment."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        pointer, offset, value = values
        at = builder.bitcast(offset_pointer(builder, pointer, offset), value.type.as_pointer())
        builder.store(value, at, align=1)
        return context.get_dummy_value()

    return types.none(pointer, types.int64, pointer.dtype), codegen


@intrinsic
def get(context: Any, pointer: types.CPointer, offset: types.Integer) -> Any:
    """The number `offset` bytes on, at any alignment."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        at = offset_pointer(builder, *values)
        return builder.load(at, align=1, typ=context.get_value_type(signature.return_type))

    return pointer.dtype(pointer, types.int64), codegen


@intrinsic
def as_bfloat16(context: Any, pointer: types.CPointer) -> Any:
    """The pointer as one to single bfloat16 numbers, see `narrow`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        return builder.bitcast(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(pointer), codegen


def _constant_of_pointee(name: str, result: types.Type, value: Callable[[types.Type], int]) -> Any:
    """An intrinsic that answers a question about what a pointer points to while compiling."""

    def typing(context: Any, pointer: types.CPointer) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
            return context.get_constant(result, value(pointer.dtype))

        return result(pointer), codegen

    typing.__name__ = name
    return intrinsic(typing)


holds_pairs = _constant_of_pointee("holds_pairs", types.boolean, lambda dtype: dtype == PAIRS)
holds_two = _constant_of_pointee("holds_two", types.boolean, lambda dtype: dtype in (PAIRS, WORDS))
pointee_bytes = _constant_of_pointee("pointee_bytes", types.int64, lambda dtype: BYTES[dtype])


@intrinsic
def fetch_add(context: Any, counters: types.Array, row: types.Integer) -> Any:
    """Add 1 to counters[row, 0], atomically, and return what it was.

    What a thread has written before is seen by those that add after it.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        array = context.make_array(signature.args[0])(context, builder, values[0])
        stride = builder.extract_value(array.strides, 0)
        data = offset_pointer(builder, array.data, builder.mul(values[1], stride))
        return builder.atomic_rmw("add", data, ir.Constant(I64, 1), "acq_rel")

    return types.int64(counters, types.int64), codegen
