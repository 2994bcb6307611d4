"""User functions of scores, `score_mod` and `mask_mod`, compiled to small passes over one tile.

A kernel that took a user's function in would have to be compiled again for each.  Instead it calls, between two
products, a pass by its address: only the pass is compiled, in memory, and the kernel on disk knows but its signature.

A function may use numbers, arrays, tuples of them and other functions, from its closure, globals and modules.  Numbers
become constants of the pass.  Arrays do not: other contents, and other arrays of the same type, need no other pass.
All that holds for the functions that it calls as well, Python's and `@njit` ones, which are compiled with it by the
rules of this package, whatever their own options.  They can only be called, not handed on as values.  (What Numba
itself implements, a function with an `@overload` included, is Numba's: an array that the implementation captures is
frozen.)

Exceptions cannot leave a kernel, nor can a kernel run out of memory half-way: functions that may raise, and those that
make arrays, are refused.  An index is not checked, as in all Numba code: that is up to the function.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import compiler, errors
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from numba_attn.cpu.captures import ARGUMENT, FLAGS, TABLE, Capture, Function, dispatcher
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import moved, pointee_bytes
from numba_attn.cpu.simd import I64

MOST_KEPT = 64
FEW = 4  # rows of a head, for which elements are gone through one by one, not by heads and keys


class Pass(NamedTuple):
    """A user function as machine code, and what it captured at the time of the call."""

    code: np.ndarray
    """(1,) intp: the address of the machine code."""
    captured: np.ndarray
    """(1 or more,) int64: the table of the captured arrays."""
    keep: tuple[Any, ...]
    """What must not be freed while the pass may run."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of pass."""

    argument: str  # the name of the function in the interface
    template: Callable[[Any], Callable[..., None]]  # the pass of a function that takes the table before its arguments
    arguments: Callable[[types.Type], tuple[types.Type, ...]]  # types of the function's, by that of the elements
    parameters: Callable[[types.Type], tuple[types.Type, ...]]  # likewise of the pass, after the table
    returned: tuple[type[types.Type], ...]  # what the function may return
    returned_in_words: str


# The passes -----------------------------------------------------------------------------------------------------------


@intrinsic
def position(context: Any, first: types.Integer, step: types.Integer) -> Any:
    """First + step, of which LLVM knows that it is not negative: an index that may be is looked at in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        first = builder.and_(values[0], ir.Constant(I64, (1 << 62) - 1))
        return builder.add(first, values[1], flags=("nuw", "nsw"))

    return types.int64(types.int64, types.int64), codegen


@device
def elements_on(pointer, count):
    """The pointer `count` elements on."""
    return moved(pointer, count * pointee_bytes(pointer))


@device
def fill_others(pointer, n, width, queries):
    """Lanes of (n, width) that are no queries get what the last query has."""
    for key in range(n if queries < width else 0):
        row = elements_on(pointer, key * width)
        for lane in range(queries, width):
            row[lane] = row[queries - 1]


@device
def inverse_of(divisor):
    """What a number below 2 ** 16 is multiplied by, and shifted 32 bits, to be divided by one below 2 ** 16."""
    return (1 << 32) // divisor + 1


@device
def place_of(at, width, in_width, rows, in_rows, queries):
    """Of which key, head and row the element `at` of (n, width) is, and whether of a query: else as the last one."""
    key = (at * in_width) >> 32
    lane = at - key * width
    query = min(lane, queries - 1)
    head = (query * in_rows) >> 32
    return key, head, query - head * rows, lane == query


def _score_pass(user: Any) -> Callable[..., None]:
    def score_pass(captured, s, n, width, rows, heads, factor, b, h, i, j):
        if rows < FEW:
            in_width, in_rows = inverse_of(width), inverse_of(rows)
            for at in range(n * width):
                key, head, row, own = place_of(at, width, in_width, rows, in_rows, rows * heads)
                score = s[at] * factor if own else factor * 0
                s[at] = user(captured, score, b, position(h, head), position(i, row), position(j, key))
        else:
            for head in range(heads):
                first = head * rows
                for key in range(n):
                    row = elements_on(s, key * width + first)
                    for lane in range(rows):
                        score = row[lane] * factor
                        row[lane] = user(captured, score, b, position(h, head), position(i, lane), position(j, key))
        fill_others(s, n, width, rows * heads)

    return score_pass


def _mask_pass(user: Any) -> Callable[..., None]:
    def mask_pass(captured, bias, fresh, n, width, rows, heads, b, h, i, j):
        if fresh:
            for at in range(n * width):
                bias[at] = 0
        if rows < FEW:
            in_width, in_rows = inverse_of(width), inverse_of(rows)
            for at in range(n * width):
                key, head, row, _ = place_of(at, width, in_width, rows, in_rows, rows * heads)
                if not user(captured, b, position(h, head), position(i, row), position(j, key)):
                    bias[at] = -np.inf
        else:
            for head in range(heads):
                first = head * rows
                for key in range(n):
                    row = elements_on(bias, key * width + first)
                    for lane in range(rows):
                        if not user(captured, b, position(h, head), position(i, lane), position(j, key)):
                            row[lane] = -np.inf
        fill_others(bias, n, width, rows * heads)

    return mask_pass


def integers(count: int) -> tuple[types.Type, ...]:
    return (types.int64,) * count


SCORE = Kind(
    "score_mod",
    _score_pass,
    lambda element: (element, *integers(4)),
    lambda element: (types.CPointer(element), *integers(4), element, *integers(4)),
    (types.Integer, types.Float),
    "a real number",
)
DERIVATIVE = replace(SCORE, argument="score_mod_grad")
MASK = Kind(
    "mask_mod",
    _mask_pass,
    lambda element: integers(4),
    lambda element: (types.CPointer(element), types.boolean, *integers(8)),
    (types.Integer, types.Boolean),
    "True or False",
)


def call_pass(kind: Kind) -> Callable[[Callable[..., None]], Any]:
    """Make an intrinsic, with the parameters and the docstring of a function, that calls a pass by its address."""

    def decorate(function: Callable[..., None]) -> Any:
        first, *names = inspect.signature(function).parameters

        def typing(context: Any, codes: types.Array, index: types.Integer, captured: types.Array, *args: Any) -> Any:
            pointer = args[0]
            passed = (TABLE, *kind.parameters(pointer.dtype))

            def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
                (codes, index, captured, *values), kinds = list(values), signature.args
                slots = context.make_array(kinds[0])(context, builder, codes).data
                convention = context.call_conv
                callee_type = convention.get_function_type(types.none, passed).as_pointer()
                callee = builder.load(builder.gep(slots, [index], source_etype=I64), typ=callee_type)
                table = context.make_array(kinds[2])(context, builder, captured).data
                convention.call_function(builder, callee, types.none, passed, [table, *values])  # passes raise nothing
                return context.get_dummy_value()

            return types.none(codes, types.int64, captured, *passed[1:]), codegen

        typing.__name__ = typing.__qualname__ = function.__name__
        typing.__doc__ = function.__doc__
        typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("context", first, *names)]
        )
        return intrinsic(typing)

    return decorate


@call_pass(SCORE)
def run_score_pass(codes, index, captured, s, n, width, rows, heads, factor, b, h, i, j):
    """s[key, lane] = score_mod(s[key, lane] * factor, b, h + lane // rows, i + lane % rows, j + key).

    The pass is the one at codes[index], `codes` an intp array, with the table `captured`.  s is a pointer to (n, width)
    elements, fewer than 2 ** 16, of which the first of each key are queries, `rows` of each of the `heads`; the others
    get the value of the last query.  All integers are int64, and h, i and j not negative; factor is of the element
    type.
    """


@call_pass(MASK)
def run_mask_pass(codes, index, captured, bias, fresh, n, width, rows, heads, b, h, i, j):
    """bias[key, lane] = -inf unless mask_mod(b, h + lane // rows, i + lane % rows, j + key).

    The arguments are those of `run_score_pass`; the bias, a pointer to (n, width), is 0 before if it is `fresh`.
    """


# Compilation ----------------------------------------------------------------------------------------------------------


def score_pass(function: Callable[..., Any], dtype: Any) -> Pass:
    """A pass for `run_score_pass`, of a function (score, b, h, i, j) -> number, for scores of a dtype."""
    return make_pass(SCORE, function, dtype)


def derivative_pass(function: Callable[..., Any], dtype: Any) -> Pass:
    """A pass for `run_score_pass` too, of the derivative of such a function."""
    return make_pass(DERIVATIVE, function, dtype)


def mask_pass(function: Callable[..., Any], dtype: Any) -> Pass:
    """A pass for `run_mask_pass`, of a function (b, h, i, j) -> bool, for scores of a dtype."""
    return make_pass(MASK, function, dtype)


def make_pass(kind: Kind, function: Callable[..., Any], dtype: Any) -> Pass:
    """Compile a pass, or take it from those kept, for the values that the function captures now."""
    python: Any = getattr(function, "py_func", function)  # of a Numba dispatcher
    capture = Capture()
    try:
        key, captured = capture.function(python)
        code, library = _kept_pass((kind, np.dtype(dtype).char, key), captured)
    except TypeError as reason:
        raise TypeError(f"{kind.argument} {python.__qualname__!r} cannot be compiled: {reason}") from reason
    return Pass(code, capture.table(), (library, *capture.arrays))


_kept: OrderedDict[Any, tuple[np.ndarray, Any]] = OrderedDict()


def _kept_pass(key: tuple[Kind, str, Any], function: Function) -> tuple[np.ndarray, Any]:
    """The address of a pass, and the library that holds its machine code."""
    found = _kept.get(key)  # without the lock: others may compile for seconds
    if found is None:
        # The compiler's lock, and none of its own beside it: a child is forked while nobody has that one, see `jit`.
        with global_compiler_lock:
            found = _kept.get(key) or compile_pass(key[0], function, from_dtype(np.dtype(key[1])))
            _kept[key] = found
            if len(_kept) > MOST_KEPT:
                _kept.popitem(last=False)
    with contextlib.suppress(KeyError):  # another thread may have removed it
        _kept.move_to_end(key)
    return found


def compile_pass(kind: Kind, function: Function, element: types.Type) -> tuple[np.ndarray, Any]:
    arguments = (TABLE, *kind.arguments(element))
    user = dispatcher(function)
    try:
        user.compile(arguments)
        returned = user.overloads[arguments].signature.return_type
        if not isinstance(returned, kind.returned):
            raise TypeError(f"it must return {kind.returned_in_words}, got {returned}")
        flags = compiler.Flags()
        cpu_target.options.parse_as_flags(flags, FLAGS)
        flags.noalias = True  # a captured array that could change with every store could not be read in vectors
        contexts = cpu_target.typing_context, cpu_target.target_context
        parameters = (TABLE, *kind.parameters(element))
        result = compiler.compile_extra(*contexts, kind.template(user), parameters, types.none, flags, {})
    except (errors.NumbaError, RuntimeError) as error:
        raise TypeError(_essence(str(error))) from error
    name = result.fndesc.llvm_func_name
    if re.search(r"^ *ret i32 (?!0$)", _definition(result.library.get_llvm_str(), name), re.M):
        raise TypeError("it may raise, and exceptions cannot leave a kernel (an index into a tuple? take an array)")
    return np.array([result.library.get_pointer_to_function(name)], np.intp), result.library


def _definition(module: str, name: str) -> str:
    """The text of a function in that of an LLVM module."""
    return module.split(f"@{name}(", 1)[1].split("\n}", 1)[0]


def _essence(message: str) -> str:
    """Why, in the many lines that Numba writes."""
    if "NRT required" in message:
        return "it must not make arrays or lists: kernels do not allocate"
    if "Cannot bind" in message and ARGUMENT in message:
        return "a function that it captures can only be called, with the arguments that it takes, none by keyword alone"
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()]
    reasons = itertools.takewhile(lambda line: not line.startswith('File "'), lines)
    return " ".join([line for line in reasons if line and not line.startswith(_FRAMING)][:3])[:400]


_FRAMING = ("Failed in", "During:", "There are", "- ", "Overload", "With argument")
