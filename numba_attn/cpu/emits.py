"""What a function of `simd.Vectors` is to Numba: something that compiled code can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numba_attn.cpu import target
from numba_attn.cpu.simd import BYTES, ELEMENTS, Value, Vectors


def _call_apart(
    builder: ir.IRBuilder,
    name: str,
    returns: ir.Type,
    build: Callable[[ir.IRBuilder, Sequence[Value]], Value | None],
    values: Sequence[Value],
) -> Value:
    """Call a function of a module's own that is built once, and has all registers for itself."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(returns, [x.type for x in values]), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        function.attributes.alignstack = target.VECTOR_BYTES  # for what it spills, see `pointers.align_stack`
        inside = ir.IRBuilder(function.append_basic_block())
        result = build(inside, function.args)
        inside.ret_void() if result is None else inside.ret(result)
    return builder.call(function, values)


def emits(build: Callable[..., Value | None], returns: types.Type = types.void, apart: bool = False) -> Any:
    """Make `build(vectors, *values)` callable from Numba-compiled code.

    The element type is that of the first pointer argument; integers arrive as 64-bit, pointers as addresses.  What is
    decided while emitting are keywords, fixed by `partial`.  What is to stand `apart` is called, not put where it
    is used, so that what is there does not push its numbers out of registers.
    """
    function, fixed = (build.func, build.keywords) if isinstance(build, partial) else (build, {})
    first, *parameters = (p for p in inspect.signature(build).parameters.values() if p.kind is not p.KEYWORD_ONLY)

    def typing(context: Any, *args: types.Type) -> Any:
        args = tuple(types.unliteral(a) for a in args)
        pointees = {p.name: a.dtype for p, a in zip(parameters, args, strict=True) if isinstance(a, types.CPointer)}
        dtype = next((d for d in pointees.values() if d in ELEMENTS), types.float32)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
            def emit(builder: ir.IRBuilder, values: Sequence[Value]) -> Value | None:
                vectors = Vectors(builder, dtype, target.VECTOR_BYTES // BYTES[dtype])
                vectors.pointees = pointees
                return build(vectors, *values)

            nothing = returns == types.void
            if apart:
                kind = ir.VoidType() if nothing else context.get_value_type(returns)
                name = f"{function.__module__}.{function.__name__}{args}{fixed or ''}"
                result = _call_apart(builder, name, kind, emit, values)
            else:
                result = emit(builder, values)
            return context.get_dummy_value() if nothing else result

        return returns(*args), codegen

    typing.__name__ = typing.__qualname__ = function.__name__
    typing.__doc__ = function.__doc__
    typing.__signature__ = inspect.Signature([first.replace(name="context"), *parameters])  # type: ignore[attr-defined]
    return intrinsic(typing)
