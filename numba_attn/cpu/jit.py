"""The one place with Numba options and the policy of the on-disk cache.

`device` compiles a function into the kernels that call it; `kernel` makes an entry point that Python calls.  Both
state every option that Numba would otherwise take over from a caller: no fast-math (it would assume away -inf and NaN),
NumPy's division (an exception inside a parallel region is lost), and no GIL.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from numba_attn.cpu import target

OPTIONS: dict[str, Any] = {"fastmath": False, "error_model": "numpy", "nogil": True, "boundscheck": False}

device = numba.njit(**OPTIONS)


def kernel(function: Callable[..., Any]) -> Any:
    """A serial entry point, cached on disk."""
    return _cached(numba.njit(**OPTIONS)(function))


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """An entry point whose `prange` runs on Numba's threads, cached on disk."""
    return _cached(numba.njit(parallel=True, **OPTIONS)(function))


def _cached(dispatcher: Any) -> Any:
    if cache_directory() is not None:
        dispatcher._cache = _PackageCache(dispatcher.py_func)
    return dispatcher


_compiling = threading.Lock()


class Compiled(NamedTuple):
    """A kernel for one signature."""

    call: Callable[..., None]
    """From Python; directly, as a dispatcher would look at every argument again and compile anew for each layout."""
    code: np.ndarray
    """(1,) array that holds the address of the machine code, for `through_pointer`."""


def compiled(dispatcher: Any, signature: tuple[types.Type, ...]) -> Compiled:
    """Compile a kernel, or load it from the cache."""
    with _compiling:
        dispatcher.compile(signature)
        result = dispatcher.overloads[signature]
        address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    return Compiled(result.entry_point, np.array([address], np.intp))


def through_pointer(function: Callable[..., Any]) -> Any:
    """An intrinsic that calls `function`, compiled elsewhere, by the address in its first argument.

    So a parallel kernel holds no second copy of the machine code, nor the time that it takes to compile it.
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
    typing.__name__ = typing.__qualname__ = f"{function.__name__}_through_pointer"
    typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return intrinsic(typing)


@functools.cache
def cache_directory() -> Path | None:
    """Where compiled kernels are kept: the first writable of `NUMBA_CACHE_DIR`, the package's own `__pycache__` and the
    user's cache directory; None if none is.
    """
    package = Path(__file__).parent
    candidates = [package / "__pycache__", _user_cache() / "numba_attn"]
    if os.environ.get("NUMBA_CACHE_DIR"):
        candidates = [Path(os.environ["NUMBA_CACHE_DIR"]) / "numba_attn"]
    for directory in candidates:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError:
            continue
        return directory
    return None


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~\\AppData\\Local")).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


@functools.cache
def fingerprint() -> str:
    """Of all that a compiled kernel depends on beside its own function: every source of this package, and the versions.

    Numba itself looks only at the file that defines the entry point, not at the helpers that are compiled into it.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {target.ISA} {target.BFLOAT16}".encode())
    here = Path(__file__).parent
    above = [here.parent / name for name in ("block_mask.py", "random.py")]  # of which kernels have constants
    for source in [*sorted(here.glob("*.py")), *above]:
        digest.update(source.read_bytes())
    return digest.hexdigest()


class _Locator:
    """Tells Numba's cache where to put a function, and what makes an entry stale."""

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Locator:
        return cls()

    def ensure_cache_path(self) -> None:
        Path(self.get_cache_path()).mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(cache_directory())

    def get_source_stamp(self) -> str:
        return fingerprint()

    def get_disambiguator(self) -> str:
        return f"{target.ISA}-{target.BFLOAT16}"


class _PackageCache(FunctionCache):
    class _impl_class(FunctionCache._impl_class):  # type: ignore[name-defined, misc]
        _locator_classes = (_Locator,)
