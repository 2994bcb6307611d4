"""The one place with Numba options.

`device` compiles a function into the kernels that call it, and only there: Python may call its `py_func`.  `kernel`
and its like make entry points that Python calls.  All state every option that Numba would otherwise take over from a
caller: no fast-math (it would assume away -inf and NaN), NumPy's division (an exception inside a parallel region is
lost), and no GIL.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from numba_attn.cpu import cache
from numba_attn.cpu.compilers import CountingPartCompiler, KernelCompiler, PartCompiler

if numba.config.DISABLE_JIT:
    raise NotImplementedError("backend 'cpu' needs Numba's compiler, which NUMBA_DISABLE_JIT turns off")

OPTIONS: dict[str, Any] = {"fastmath": False, "error_model": "numpy", "nogil": True, "boundscheck": False}
OPTIONS["no_cfunc_wrapper"] = True  # an entry for C, which nobody calls, and which takes long to compile
# Kernels make no arrays, and keep no count of who has one: the caller has all of them, and each change of a count is a
# locked operation on a cache line that all threads share.
UNCOUNTED: dict[str, Any] = {**OPTIONS, "_nrt": False}


device = numba.njit(pipeline_class=PartCompiler, **UNCOUNTED)
# For code that makes arrays, and counts them: what it gets from a `device` is not counted, so must be no array.
counting_device = numba.njit(pipeline_class=CountingPartCompiler, **OPTIONS)


def kernel(function: Callable[..., Any]) -> Any:
    """An entry point that makes no arrays, cached on disk."""
    return _cached(numba.njit(pipeline_class=KernelCompiler, **UNCOUNTED)(function))


def counting_kernel(function: Callable[..., Any]) -> Any:
    """An entry point that makes arrays, cached on disk."""
    return _cached(numba.njit(**OPTIONS)(function))


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """An entry point whose `prange` runs on Numba's threads, cached on disk."""
    return _cached(numba.njit(parallel=True, **OPTIONS)(function))


def _cached(dispatcher: Any) -> Any:
    if cache.directory() is not None:
        dispatcher._cache = cache.PackageCache(dispatcher.py_func)
    return dispatcher


class Compiled(NamedTuple):
    """A kernel for one signature."""

    call: Callable[..., None]
    """From Python; directly, as a dispatcher would look at every argument again and compile anew for each layout."""
    code: np.ndarray
    """(1,) array that holds the address of the machine code, for `through_pointer`."""


def compiled(dispatcher: Any, signature: tuple[types.Type, ...]) -> Compiled:
    """Compile a kernel, or load it from the cache."""
    with global_compiler_lock, _uncollected():
        try:
            dispatcher.compile(signature)
        finally:
            cache.one_process.release()
        result = dispatcher.overloads[signature]
        address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    return Compiled(result.entry_point, np.array([address], np.intp))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: it would look at millions of objects that the compiler keeps, and find none."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def through_pointer(function: Callable[..., Any]) -> Any:
    """An intrinsic that calls `function`, compiled elsewhere, by the address in its first argument.

    So the caller holds no second copy of the machine code, nor takes the time to compile it.
    """

    def typing(context: Any, code: types.Array, *args: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            (code, *values), kinds = values, signature.args[1:]
            convention = context.call_conv
            slot = context.make_array(signature.args[0])(context, builder, code).data
            target_type = convention.get_function_type(types.none, kinds).as_pointer()
            callee = builder.load(slot, typ=target_type)
            convention.call_function(builder, callee, types.none, kinds, values)  # kernels raise nothing
            return context.get_dummy_value()

        return types.none(code, *args), codegen

    names = ("context", "code", *inspect.signature(function).parameters)
    return intrinsic_of(typing, f"{function.__name__}_through_pointer", names)


def intrinsic_of(typing: Callable[..., Any], name: str, parameters: Iterable[str]) -> Any:
    """An intrinsic of so many parameters, which its function takes as *args."""
    typing.__name__ = typing.__qualname__ = name
    typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in parameters]
    )
    return intrinsic(typing)


# A child that is forked while another thread compiles would find the compiler's lock taken, by nobody.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
