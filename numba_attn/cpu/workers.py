"""The parallel loop of all kernels, over the workers that share the tasks of a call.

A kernel is compiled once, for one thread and for many: it has Numba's threads called through the loop's address, and
they get the address of its arguments.  So there is one parallel loop to compile, of three integers, and not one with a
copy of the arguments for each kernel and each type.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from numba_attn.cpu.jit import compiled, intrinsic_of, parallel_kernel
from numba_attn.cpu.tuples import Addressed, by_address


@parallel_kernel
def call_for_each(code, arguments, workers):
    """Have so many of Numba's threads call what is at the address `code`, each with its number; see `by_workers`."""
    for worker in prange(workers):
        _call_for(worker, code, arguments)


@functools.cache
def launcher() -> int:
    """The address of `call_for_each`; Numba's threads are there then."""
    return int(compiled(call_for_each, (types.intp,) * 3).code[0])


@intrinsic
def _call_for(context: Any, worker: types.Integer, code: types.Integer, arguments: types.Integer) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        worker, code, arguments = values
        kind = _of_worker(context)
        callee = builder.inttoptr(code, kind.as_pointer())
        builder.call(callee, [worker, builder.inttoptr(arguments, kind.args[1])])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), codegen


def _of_worker(context: Any) -> ir.FunctionType:
    """What is compiled for `call_for_each`: a function of a worker's number, and a pointer to its arguments."""
    return ir.FunctionType(ir.VoidType(), [context.get_value_type(t) for t in (types.intp, types.voidptr)])


def by_workers(part: Any) -> Any:
    """An intrinsic of (`launcher()`, memories, *arguments), which has as many workers as there are memories call
    `part(worker, memories, *arguments)` at once.  If there is one, it is the caller, and nothing is launched.

    The part gets named tuples by their address, see `tuples`.
    """

    def typing(context: Any, launcher: types.Integer, *kinds: types.Type) -> Any:
        taken = tuple(map(by_address, kinds))
        result = part.get_compile_result(types.none(types.intp, *taken))

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            (launcher, *given), convention = values, context.call_conv
            held = cgutils.alloca_once(builder, ir.LiteralStructType([x.type for x in given]))
            for place, x in enumerate(given):
                builder.store(x, cgutils.gep_inbounds(builder, held, 0, place))

            function = ir.Function(builder.module, _of_worker(context), f"{part.py_func.__qualname__}.of_worker")
            function.linkage = "internal"
            function.attributes.add("noinline")  # or there would be a second copy where it is called directly
            inner = ir.IRBuilder(function.append_basic_block("entry"))
            worker, pointer = function.args
            source = inner.bitcast(pointer, held.type)
            places = [cgutils.gep_inbounds(inner, source, 0, place) for place in range(len(given))]
            passed = [
                x if isinstance(kind, Addressed) else inner.load(x) for x, kind in zip(places, taken, strict=True)
            ]
            callee = context.declare_function(builder.module, result.fndesc)
            context.add_linking_libs([result.library])
            # Kernels raise nothing.
            convention.call_function(inner, callee, types.none, (types.intp, *taken), [worker, *passed])
            inner.ret_void()

            memories = context.make_array(kinds[0])(context, builder, given[0])
            workers = builder.extract_value(memories.shape, 0)
            integer = workers.type
            with builder.if_else(builder.icmp_signed("==", workers, integer(1))) as (alone, together):
                with alone:
                    builder.call(function, [integer(0), builder.bitcast(held, pointer.type)])
                with together:
                    integers = (types.intp,) * 3
                    callee = builder.inttoptr(launcher, convention.get_function_type(types.none, integers).as_pointer())
                    addresses = [builder.ptrtoint(x, integer) for x in (function, held)]
                    convention.call_function(builder, callee, types.none, integers, [*addresses, workers])
            return context.get_dummy_value()

        return types.none(types.intp, *kinds), codegen

    names = ("context", "launcher", *list(inspect.signature(part.py_func).parameters)[1:])
    return intrinsic_of(typing, f"{part.py_func.__name__}_by_workers", names)
