"""What a user function captures, and Numba's compiler with captured arrays as arguments.

Numba freezes every array that a function takes from its closure or globals.  Here each function, and each that it
calls, gets one more argument in front: the address of a table with the addresses, shapes and strides of all captured
arrays.  A pass of the compiler then replaces them in Numba's IR: arrays by what is built from the table, functions by
those that take the table.
"""

from __future__ import annotations

import dis
import functools
import inspect
import random
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir as llvm
from numba import types
from numba.core import cgutils, compiler, errors, ir, ir_utils
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.untyped_passes import InlineClosureLikes
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from numba_attn import checks
from numba_attn.cpu.conversions import InVectors
from numba_attn.cpu.jit import OPTIONS

TABLE = types.CPointer(types.int64)
# No wrappers for Python, and no allocations.
FLAGS = {**OPTIONS, "nopython": True, "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
ARGUMENT = "_numba_attn_captured"


# What a function captures ---------------------------------------------------------------------------------------------


class CapturedArray(NamedTuple):
    """A captured array: where in the table it starts, and its type."""

    offset: int
    dtype: types.Type
    ndim: int
    layout: str
    aligned: bool


class Function(NamedTuple):
    """A function with those captured values that Numba is not to take as constants, by the path that leads to them."""

    python: FunctionType
    replaced: dict[tuple[str, ...], Any]  # CapturedArray, Function, or a tuple of these and of constants


class Capture:
    """Collects what a function, and all those that it calls, capture."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.size = 0  # of the table
        self.active: list[FunctionType] = []

    def function(self, python: FunctionType) -> tuple[Any, Function]:
        """Its key, which is equal for functions that one pass will do for, and what to compile."""
        if any(f is python for f in self.active):
            raise TypeError(f"{python.__qualname__!r} must not call itself")
        self.active.append(python)
        default_key, defaults = self.value(python.__defaults__)
        if defaults is not python.__defaults__:
            raise TypeError(f"{python.__qualname__!r} must not have an array or a function as default")
        keys, replaced = [default_key], {}
        for path in _paths(python.__code__):
            value, path = _resolve(python, path)
            if value is not _MISSING and path not in replaced:
                key, replacement = self.value(value)
                keys.append((path, key))
                if replacement is not value:
                    replaced[path] = replacement
        self.active.pop()
        return (python.__code__, tuple(keys)), Function(python, replaced)

    def value(self, value: Any) -> tuple[Any, Any]:
        """The key of a captured value, and what it is replaced by: itself if it is a constant."""
        kind = type(value)
        if kind in (int, bool, str, type(None)):
            return (kind, value), value
        if isinstance(value, float | complex | np.generic):
            return (kind, repr(value)), value  # tells -0.0 from 0.0, and NaN is equal to itself
        if isinstance(value, np.ndarray):
            return self.array(value)
        if isinstance(value, ModuleType) and value.__name__.split(".")[0] not in _CONSTANT:
            raise TypeError(
                f"what it reads of the module {value.__name__!r} must be written as an attribute of it, not of another "
                "name that it gives the module"
            )
        if isinstance(getattr(value, "__self__", None), np.random.RandomState | random.Random):
            raise TypeError("it must not draw random numbers: the same call would have another result each time")
        value = _SUBSTITUTES.get(value, value) if callable(value) else value
        if isinstance(value, CPUDispatcher):
            return self.function(value.py_func)
        if isinstance(value, FunctionType) and not _known_to_numba(value):
            return self.function(value)
        if isinstance(value, tuple):
            pairs = [self.value(x) for x in value]
            keys, replacements = (kind, *(key for key, _ in pairs)), tuple(new for _, new in pairs)
            if all(new is old for new, old in zip(replacements, value, strict=True)):
                return keys, value
            if kind is tuple:
                return keys, replacements
            raise TypeError(f"a captured {checks.type_name(value)} must not hold arrays or functions")
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"a captured {checks.type_name(value)} cannot be compiled: numbers, tuples and arrays can"
            ) from None
        return (kind, value), value

    def array(self, array: np.ndarray) -> tuple[Any, CapturedArray]:
        dtype = array.dtype
        if not dtype.isnative:
            raise TypeError(f"a captured array must be in native byte order, got {dtype}")
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("a captured array must not be a masked array")
        element = _element_type(dtype)
        layout = "C" if array.flags.c_contiguous else "A"
        captured = CapturedArray(self.size, element, array.ndim, layout, array.flags.aligned)
        self.arrays.append(array)
        self.size += 1 + 2 * array.ndim
        return captured, captured

    def table(self) -> np.ndarray:
        numbers = [n for a in self.arrays for n in (a.__array_interface__["data"][0], *a.shape, *a.strides)]
        return np.array(numbers or [0], np.int64)


_MISSING = object()
_CONSTANT = ("cmath", "math", "numba", "numpy", "operator")  # modules in which nothing changes


def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


def _clip(a: Any, a_min: Any, a_max: Any) -> Any:
    return min(max(a, a_min), a_max)


# Of NumPy's functions those that Numba has for arrays only.
_SUBSTITUTES: dict[Any, Any] = {np.where: _where, np.clip: _clip}


@functools.lru_cache(maxsize=256)
def _paths(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """What code reads of globals and of its closure, as ("global" or "free", name, attributes that are read of it)."""
    found = dict.fromkeys(_reads(code, code.co_freevars))
    return tuple(found)


def _reads(code: CodeType, free: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    path: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and path:
            path = (*path, name)
        elif operation != "EXTENDED_ARG":
            if path:
                yield path
            path = ()
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                path = ("global", name)
            elif operation == "LOAD_DEREF" and name in free and name not in code.co_cellvars:
                path = ("free", name)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside, which Numba puts in line
            yield from _reads(constant, free)


def _resolve(python: FunctionType, path: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """The value at the end of a path, or before its first attribute of anything but a module; and the path to there."""
    kind, name, *attributes = path
    if kind == "global":
        value = python.__globals__.get(name, _MISSING)
    else:
        cell = (python.__closure__ or ())[python.__code__.co_freevars.index(name)]
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            return _MISSING, path
    reached = path[:2]
    for attribute in attributes:
        if not isinstance(value, ModuleType):
            break
        value, reached = getattr(value, attribute, _MISSING), (*reached, attribute)
    return value, reached


@functools.lru_cache(maxsize=64)
def _element_type(dtype: np.dtype) -> types.Type:
    try:
        if dtype.hasobject or dtype.char == "e":  # Numba has no arithmetic for half precision
            raise NotImplementedError
        return from_dtype(dtype)
    except (errors.NumbaError, NotImplementedError):
        raise TypeError(f"a captured array must be of numbers that Numba knows, got {dtype}") from None


def _known_to_numba(function: FunctionType) -> bool:
    """Whether Numba has an implementation of its own: then the source may be anything."""
    return _typing_context()._lookup_global(function) is not None


@functools.cache
def _typing_context() -> Any:
    cpu_target.typing_context.refresh()  # Numba fills it when it first compiles
    return cpu_target.typing_context


# Numba's part ---------------------------------------------------------------------------------------------------------


@register_pass(mutates_CFG=True, analysis_only=False)
class _ReplaceCaptured(FunctionPass):
    """Replaces what is not to be a constant in Numba's IR of a function, and refuses what cannot run in a kernel."""

    _name = "numba_attn_replace_captured"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        func_ir, function = state.func_ir, state.func_id.func.captures
        name = repr(function.python.__qualname__)
        statements = [x for block in func_ir.blocks.values() for x in block.body]
        if any(isinstance(x, _RAISES) for x in statements):
            raise TypeError(f"{name} must not raise: exceptions cannot leave a kernel")
        values = [x.value for x in statements if isinstance(x, ir.Assign)]
        if any(isinstance(x, ir.Expr) and x.op == "make_function" for x in values):
            raise TypeError(f"{name} must not use an inner function as a value")
        entry = func_ir.blocks[min(func_ir.blocks)]
        table = ir.Var(entry.scope, ir_utils.mk_unique_var("$table"), func_ir.loc)
        entry.body.insert(0, ir.Assign(ir.Arg(ARGUMENT, 0, func_ir.loc), table, func_ir.loc))
        replaced = function.replaced
        replacements = {id(x): replaced[path] for x in values if (path := _path_of(func_ir, x)) in replaced}
        for value in values:
            if isinstance(value, ir.Expr) and value.op == "call":
                callee = ir_utils.guard(ir_utils.get_definition, func_ir, value.func)
                if isinstance(replacements.get(id(callee)), Function):
                    value.args = [table, *value.args]
        for block in func_ir.blocks.values():
            body: list[Any] = []
            for statement in block.body:
                if isinstance(statement, ir.Assign) and id(statement.value) in replacements:
                    statement.value = _build(replacements[id(statement.value)], table, statement, body)
                body.append(statement)
            block.body = body
        func_ir._definitions = ir_utils.build_definitions(func_ir.blocks)
        state.typingctx.refresh()  # the intrinsics just made
        return True


_RAISES = (ir.Raise, ir.StaticRaise, ir.TryRaise, ir.StaticTryRaise, ir.DynamicRaise, ir.DynamicTryRaise)


def _path_of(func_ir: Any, value: Any) -> tuple[str, ...] | None:
    """The path, as `_paths` gives it, of what a value in Numba's IR reads."""
    if isinstance(value, ir.Global):
        return "global", value.name
    if isinstance(value, ir.FreeVar):
        return "free", value.name
    if isinstance(value, ir.Expr) and value.op == "getattr":
        base = _path_of(func_ir, ir_utils.guard(ir_utils.get_definition, func_ir, value.value))
        return base and (*base, value.attr)
    return None


def _build(replacement: Any, table: ir.Var, statement: ir.Assign, body: list[Any]) -> Any:
    """A value of Numba's IR for a replacement; what it needs before is appended to `body`."""
    scope, loc = statement.target.scope, statement.loc

    def variable(value: Any) -> ir.Var:
        target = ir.Var(scope, ir_utils.mk_unique_var("$captured"), loc)
        body.append(ir.Assign(value, target, loc))
        return target

    if isinstance(replacement, CapturedArray):
        array = variable(ir.Global("captured_array", _captured_array(replacement), loc))
        return ir.Expr.call(array, [table], (), loc)
    if isinstance(replacement, Function):
        return ir.Global(replacement.python.__name__, dispatcher(replacement), loc)
    if type(replacement) is tuple:
        return ir.Expr.build_tuple([variable(_build(x, table, statement, body)) for x in replacement], loc)
    return ir.Const(replacement, loc)


class _Compiler(compiler.CompilerBase):
    """Numba's compiler, with arrays as arguments."""

    def compile_extra(self, function: Any) -> Any:
        self.state.library = InVectors(self.state.targetctx.codegen(), function.__qualname__)
        return super().compile_extra(function)

    def define_pipelines(self) -> list[Any]:
        passes = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_ReplaceCaptured, InlineClosureLikes)
        passes.finalize()
        return [passes]


def dispatcher(function: Function) -> Any:
    """A function that Numba-compiled code calls with the table in front of its own arguments."""
    python: Any = function.python
    copy: Any = FunctionType(
        python.__code__, python.__globals__, python.__name__, python.__defaults__, python.__closure__
    )
    copy.__qualname__, copy.__module__ = python.__qualname__, python.__module__
    table = inspect.Parameter(ARGUMENT, inspect.Parameter.POSITIONAL_ONLY)
    own = inspect.signature(python)
    # Numba takes the arguments of a function from its signature.
    copy.__signature__ = inspect.Signature([table.replace(kind=_first_kind(own)), *own.parameters.values()])
    copy.captures = function
    return CPUDispatcher(copy, targetoptions={**FLAGS, "forceinline": True}, pipeline_class=_Compiler)


def _first_kind(own: inspect.Signature) -> Any:
    kinds = [p.kind for p in own.parameters.values()]
    only = inspect.Parameter.POSITIONAL_ONLY
    return only if only in kinds else inspect.Parameter.POSITIONAL_OR_KEYWORD


@functools.lru_cache(maxsize=256)
def _captured_array(captured: CapturedArray) -> Any:
    """An intrinsic that makes an array of a table of captured ones."""
    start = captured.offset
    kind = types.Array(captured.dtype, captured.ndim, captured.layout, readonly=True, aligned=captured.aligned)

    def captured_array(context: Any, table: types.CPointer) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
            i64 = llvm.IntType(64)

            def entry(i: int, of: Any = i64) -> Any:
                return builder.load(builder.gep(values[0], [llvm.Constant(i64, start + i)], source_etype=i64), typ=of)

            array = context.make_array(kind)(context, builder)
            shape, strides = ([entry(1 + k * kind.ndim + i) for i in range(kind.ndim)] for k in (0, 1))
            size = llvm.Constant(i64, 1)
            for n in shape:
                size = builder.mul(size, n)
            item = llvm.Constant(i64, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
            array.data = entry(0, array.data.type)
            array.nitems, array.itemsize = size, item
            array.shape = cgutils.pack_array(builder, shape, ty=i64)
            array.strides = cgutils.pack_array(builder, strides, ty=i64)
            array.meminfo = cgutils.get_null_value(array.meminfo.type)
            array.parent = cgutils.get_null_value(array.parent.type)
            return array._getvalue()

        return kind(TABLE), codegen

    return intrinsic(captured_array)
