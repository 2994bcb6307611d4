"""How Numba compiles this package: with which options, to what machine code, and how often."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import io
import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mods
import numba
import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from contract import STORAGE
from llvmlite import ir
from numba import types
from numba.core.caching import NullCache
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic

import numba_attn
from numba_attn import cli, create_block_mask, scaled_dot_product_attention
from numba_attn.cpu import (
    captures,
    gradients,
    inside,
    jit,
    narrow,
    score,
    target,
    tile_states,
    user_functions,
    visible,
)
from numba_attn.problem import AUX_NAMES

PACKAGE = Path(numba_attn.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
}
# The decorators of jit.py, and whether they make an entry point.
DECORATORS = {
    "device": False, "kernel": True, "parallel_kernel": True, "counting_kernel": True, "counting_device": False
}  # fmt: skip


# Options --------------------------------------------------------------------------------------------------------------


def test_numba_options_are_in_one_place() -> None:
    """Only jit.py decorates, and only the compiler of user functions makes dispatchers, with the same options."""
    decorators = {"njit", "jit", "vectorize", "guvectorize", "cfunc", "stencil", "jit_module", "generated_jit"}
    may_use = {
        **{name: {"numba_attn.cpu.jit"} for name in decorators},
        "CPUDispatcher": {"numba_attn.cpu.captures"},
        "compile_extra": {"numba_attn.cpu.user_functions"},
    }
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numba":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "numba":
                names = [node.attr]
            for name in names:
                assert module in may_use.get(name, {module}), f"{module} uses {name}"
            options = {node.arg: node.value} if isinstance(node, ast.keyword) and node.arg else {}
            if isinstance(node, ast.Dict):
                options |= {
                    k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)
                }
            if "fastmath" in options:
                assert module == "numba_attn.cpu.jit" and ast.literal_eval(options["fastmath"]) is False, module
    assert captures.FLAGS.items() >= jit.OPTIONS.items()


def decorated() -> Iterator[tuple[str, str, bool]]:
    """Module and name of each function that a decorator of jit.py compiles, and whether it is an entry point."""
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Name) and decorator.id in DECORATORS:
                    yield module, node.name, DECORATORS[decorator.id]  # type: ignore[attr-defined]


ENTRIES = {name: module for module, name, entry in decorated() if entry}
# What makes arrays of its own: it runs in no parallel region of this package.
SERIAL = {"attend"}
# The loop over the workers of all kernels.
PARALLEL = "call_for_each"


@pytest.fixture(scope="module")
def warm() -> dict[str, Any]:
    """What the command that compiles every kernel says, after calls of those that make block masks."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(["warmup", "--json"])
    for L in (20, 2000):
        create_block_mask(mods.not_later, Lq=L, Lk=L)
    gradients.warmup(["f"])
    inside.entry("f")
    return json.loads(printed.getvalue())  # type: ignore[no-any-return]


def test_options_of_every_dispatcher(warm: dict[str, Any]) -> None:
    """Of all that are alive once every module is loaded and every kernel compiled, as the garbage collector knows them.

    So those in closures and in tables count as well.  That none is missing is seen from the decorators in the sources.
    """
    for module in pkgutil.iter_modules([str(PACKAGE / "cpu")]):
        importlib.import_module(f"numba_attn.cpu.{module.name}")
    alive = {
        (x.py_func.__module__, x.py_func.__name__): x
        for x in gc.get_objects()
        if issubclass(type(x), CPUDispatcher) and x.py_func.__module__.startswith("numba_attn.")
    }
    expected = {(module, name): entry for module, name, entry in decorated()}
    assert set(expected) <= set(alive)
    assert set(ENTRIES) >= {"work", "decode", "weigh", "weigh_few", "classify", PARALLEL}
    for (module, name), dispatcher in alive.items():
        options, entry = dict(dispatcher.targetoptions), expected.get((module, name), False)
        assert {key: options.pop(key, None) for key in jit.OPTIONS} == {
            "fastmath": False, "error_model": "numpy", "nogil": True, "boundscheck": False, "no_cfunc_wrapper": True
        }, name  # fmt: skip
        assert options.pop("parallel", False) is (name == PARALLEL), name
        # Nothing that works on arrays of others counts who has them.
        counts = (entry and name in {*SERIAL, PARALLEL}) or module == "numba_attn.overloads"
        assert options == {"nopython": True, **({} if counts else {"_nrt": False})}, name
        kind = type(dispatcher._cache)
        assert kind.__module__.startswith("numba_attn.") if entry and warm["cache"] else kind is NullCache, name


def test_parts_of_kernels_are_not_for_python(warm: dict[str, Any]) -> None:
    """They have no machine code of their own: a call is an error, not a wrong answer."""
    for arguments in ((0, 24, score.Position(0, 30, 5, 0)), (1, 2, 3)):
        with pytest.raises((TypeError, numba.TypingError)):
            visible.visible(*arguments)
    assert visible.visible.overloads
    assert visible.visible.py_func(4, 6, score.Position(0, 30, 3, 0)) == (1, 6, 2, 5)


class Failing:
    """A dispatcher that compiles nothing, and looks whether garbage is collected meanwhile."""

    collecting: bool | None = None

    def compile(self, signature: tuple[types.Type, ...]) -> None:
        self.collecting = gc.isenabled()
        raise RuntimeError("nothing to compile")


@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_collected_while_compiling(collecting: bool) -> None:
    """And afterwards as before, also when the compiler has raised."""
    failing = Failing()
    if not collecting:
        gc.disable()
    try:
        with pytest.raises(RuntimeError, match="nothing to compile"):
            jit.compiled(failing, ())
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert failing.collecting is False


@numba.njit(fastmath=True, error_model="python", boundscheck=True)
def hostile(x: Any) -> Any:
    return x * x + x / 3


def uses_hostile(score: Any, b: int, h: int, i: int, j: int) -> Any:
    return hostile(score) + mods.BIAS[h % 8, (i - j) % 32]


def test_user_functions_get_the_options_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever options those of their functions have that are `@njit` already."""
    made = []

    def recorded(function: Any) -> Any:
        made.append(captures_dispatcher(function))
        return made[-1]

    captures_dispatcher = captures.dispatcher
    for module in (captures, user_functions):
        monkeypatch.setattr(module, "dispatcher", recorded)
    monkeypatch.setattr(user_functions, "_kept", type(user_functions._kept)())
    user_functions.score_pass(uses_hostile, np.float32)
    assert {x.py_func.__name__ for x in made} == {"uses_hostile", "hostile"}
    for dispatcher in made:
        assert dispatcher.targetoptions.items() >= jit.OPTIONS.items()
        assert dispatcher.targetoptions["_nrt"] is False


# Machine code ---------------------------------------------------------------------------------------------------------

FAST = re.compile(r" (fast|nnan|ninf|nsz|arcp|contract|afn|reassoc) ")
CALL = re.compile(r'\bcall .*?(?:(?P<asm>\basm\b)|@"?(?P<name>[\w.$]+)"?\(|(?P<address>%[\w.]+)\()')
FUNCTIONS = re.compile(r"llvm\.(exp(?!erimental)|pow|log|sin|cos|tan|a(sin|cos|tan))")
# Outside of LLVM: the logarithm of a row's sum.
EXTERNAL = {"log2", "log2f"}


def faults(module: str, root: str) -> list[str]:
    """What breaks the rules in a function of an LLVM module, whose name begins with `root`, and all that it calls.

    That is, or has called: the functions of workers.
    """
    functions = {
        re.search(r'@"?([\w.$]+)', text)[1]: text.split("\n}", 1)[0]  # type: ignore[index]
        for text in re.split(r"^define ", module, flags=re.M)[1:]
    }
    found: list[str] = []
    todo = [name for name in functions if name.startswith(root)]
    assert todo, f"no function {root}"
    todo += [name for name in functions if ".of_worker" in name]
    for name in todo:  # which grows meanwhile
        _, _, body = functions[name].partition("\n")
        for call in CALL.finditer(body):
            callee = call["name"] or ""
            if callee in functions:
                todo += [callee] if callee not in todo else []
            elif FUNCTIONS.match(callee) or (callee and not callee.startswith("llvm.") and callee not in EXTERNAL):
                found.append(f"calls {callee}")
        if "numba_exception_output" in body or ".picklebuf." in body:
            found.append("raises")
        found += [f"is {flag}" for flag in FAST.findall(body)]
        # Integers are made of addresses to find a distance, addresses of integers to call a function, and that is all;
        # but for the arguments of the functions of workers, where these are launched.
        launches = name.startswith(root) and (root == "__gufunc__" or any(".of_worker" in x for x in functions))
        for value, made in re.findall(r"(%\S+) = (inttoptr|ptrtoint) ", body):
            names = [value]
            for name in names:  # which grows: where ways through the function meet, it goes on under another name
                for use in re.findall(rf"^.*{re.escape(name)}(?![\w.]).*$", body, re.M):
                    allowed = rf" call (i32|void) {re.escape(name)}\(" if made == "inttoptr" else " = sub "
                    if launches:
                        allowed = f"{allowed}| call (i32|void) %"
                    result, _, operation = use.strip().partition(" = ")
                    if operation.startswith("phi ptr "):
                        names += [result] if result not in names else []
                    elif not re.search(allowed, use) and result != name:
                        found.append(f"{made}: {use.strip()}")
    return found


def llvm(result: Any) -> str:
    """The optimised module of a compiled function, of one that was loaded from the cache as well."""
    return str(result.library._get_module_for_linking())


def results_of(name: str) -> dict[Any, Any]:
    """What Numba made of an entry point, by signature."""
    return dict(getattr(importlib.import_module(ENTRIES[name]), name).overloads)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in SERIAL])
def test_machine_code_of_kernels(warm: dict[str, Any], name: str) -> None:
    """No allocation, exception, fast-math or scalar exponential, nor an address made of an integer but to be called.

    Of the parallel loop, in what its threads run.  The function around that is Numba's: it allocates the schedule, and
    raises if there are no threads.
    """
    assert results_of(name)
    for signature, result in results_of(name).items():
        module = llvm(result)
        root = "__gufunc__" if name == PARALLEL else result.fndesc.llvm_func_name
        assert faults(module, root) == [], signature
        if name in ("work", "weigh", "weigh_few"):
            assert ("@llvm.fma." in module) is target.HAS_FMA
        # A name that another kernel's code has as well must be this one's own.
        apart = re.findall(r'^define (.*@"?(?:numba_attn\.|do_tasks\.).*)', module, re.M)
        assert apart or name in {*SERIAL, PARALLEL}
        assert all(line.startswith("internal ") for line in apart), apart


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_machine_code_of_user_functions(dtype: Any) -> None:
    """The same rules for passes, in which users may call what they like of elementary mathematics."""

    def exponential(score: Any, b: int, h: int, i: int, j: int) -> Any:
        return math.exp(score) if i > j else hostile(score)

    passes = [user_functions.score_pass(f, dtype) for f in (mods.by_place, mods.relative_bias, uses_hostile)]
    passes += [user_functions.mask_pass(f, dtype) for f in (mods.prefix, mods.documents(np.arange(9), np.arange(9)))]
    passes += [user_functions.make_pass(tile_states.STATE, mods.scattered, np.uint8)]
    for made in passes:
        assert faults(made.keep[0].get_llvm_str(), "_ZN") == []
    module = user_functions.score_pass(exponential, dtype).keep[0].get_llvm_str()
    assert {re.match("calls (llvm.)?exp|", one)[0] for one in faults(module, "_ZN")} <= {"calls llvm.exp", "calls exp"}


@intrinsic
def from_integer(context: Any, address: types.Integer) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(builder.inttoptr(values[0], ir.IntType(64).as_pointer()), typ=ir.IntType(64))

    return types.int64(types.int64), codegen


def _allocates(n: int) -> Any:
    return np.empty(n).sum()


def _raises(n: int) -> int:
    total = 0
    for i in range(0, 100, n):
        total ^= i
    return total


def _looks_up(n: int) -> int:
    return (1, 2, 4)[n]


def _product(n: int) -> Any:
    return 1.5 * n + 0.1 * n * n


def _exponential(n: int) -> Any:
    return math.exp(n)


def _reads(n: int) -> Any:
    return from_integer(n + 8)


@pytest.mark.parametrize(
    ("function", "fast", "fault"),
    [
        (_allocates, False, "calls NRT_MemInfo_alloc"),
        (_raises, False, "raises"),
        (_looks_up, False, "raises"),
        (_product, True, "is fast"),
        (_exponential, False, "calls (exp|llvm.exp.f64)$"),
        (_reads, False, "inttoptr: "),
        (_product, False, None),
    ],
)
def test_faults_are_found(function: Callable[..., Any], fast: bool, fault: str | None) -> None:
    """By the test of machine code, in functions that have them."""
    dispatcher = numba.njit(error_model="numpy", fastmath=fast)(function)
    dispatcher.compile((types.int64,))
    (result,) = dispatcher.overloads.values()
    found = faults(llvm(result), result.fndesc.llvm_func_name)
    assert any(re.match(fault, one) for one in found) if fault else found == [], found


# Signatures -----------------------------------------------------------------------------------------------------------


def of_quantised(signature: tuple[types.Type, ...]) -> bool:
    """Whether a kernel's keys are of another kind than its queries: other tests may have called for that before."""
    (arrays,) = (t for t in signature if isinstance(t, types.NamedTuple) and t.instance_class is score.Arrays)
    return bool(arrays.types[0] != arrays.types[1])


def test_layouts_share_one_signature(warm: dict[str, Any]) -> None:
    """However arrays lie in memory, nothing is compiled but the one form of a kernel for their types."""
    before = {name: set(results_of(name)) for name in ENTRIES}
    many = {(kind, narrow.operand(kind, kind == "bfloat16")) for kind in narrow.COMPUTED}
    many.add(("f", narrow.operand("f", True)))
    few = set(narrow.COMPUTED.items())  # products of a few rows are those of elements
    kinds = {"work": many, "decode": few, "weigh": many, "weigh_few": few}
    for name, signatures in before.items():
        if name in kinds:
            plain = [signature for signature in signatures if not of_quantised(signature)]
            assert len(plain) == len(kinds[name]), name
    forms = [*STORAGE.values(), np.ascontiguousarray, lambda x: np.broadcast_to(x[..., :1, :], x.shape)]
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float64", *SIXTEEN_BITS):
        # The third is large enough for threads.
        for shape in ((2, 3, 1, 8), (2, 3, 20, 8), (2, 4, 130, 16)):
            x, mask = rng.standard_normal(shape).astype(dtype_of(dtype)), rng.random(shape[:3] + shape[2:3]) < 0.7
            for form in forms:
                out = np.empty_like(form(x)) if 0 not in form(x).strides else None
                for attn_mask in (form(mask), form(mask.astype(np.float32))):
                    scaled_dot_product_attention(form(x), form(x), form(x), attn_mask, out=out, return_aux=AUX_NAMES)
    for size in (8, (13, 7), 128):
        create_block_mask(mods.prefix, 2, 3, Lq=300, Lk=200, block_size=size)
    assert {name: set(results_of(name)) for name in ENTRIES} == before
