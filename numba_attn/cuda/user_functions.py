"""A user's `score_mod` and `mask_mod` as device functions, compiled into the kernel.

What a function captures is part of the compiled kernel: numbers by their values, functions, Python's and `@njit` ones,
by what they do, arrays by a copy on the device, made when contents are seen for the first time.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from numba_attn import checks

MOST_KEPT = 64


class CapturedArray:
    """A copy of a captured array on a device, as Numba takes one from a function's surroundings."""

    def __init__(self, x: np.ndarray, device: int) -> None:
        from numba_attn.cuda.launch import Machine

        x = np.asarray(x, order="C")  # `ascontiguousarray` would give one without axes one
        # On the legacy stream and waited for, so that it is there for whichever stream; and never given back.
        machine = Machine(device, 1)
        self._buffer = machine.upload(x if x.size else np.zeros(1, x.dtype))
        machine.synchronize()
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": x.dtype.str,
            "shape": x.shape,
            "strides": None,
            "data": (self._buffer.address, True),
        }


_kept: OrderedDict[Any, FunctionType] = OrderedDict()
_lock = threading.Lock()


def portable(name: str, function: Callable[..., Any], device: int) -> Callable[..., Any]:
    """The function with what it captures now in the form of a device: the same object for equal ones."""
    try:
        key = device, _key(function, ())
    except TypeError as reason:
        raise TypeError(f"{name} {function.__qualname__!r} cannot be compiled: {reason}") from None
    with _lock:
        found = _kept.get(key)
        if found is None:
            found = _kept[key] = _rebuilt(function, device)
            if len(_kept) > MOST_KEPT:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
    return found


def explained(error: Exception, configuration: tuple[Any, ...]) -> Exception:
    """A `TypeError` if the compiler refuses a user's function, else the error."""
    from numba.core.errors import NumbaError

    functions = [f.__qualname__ for f in configuration if isinstance(f, FunctionType)]
    if not functions or not isinstance(error, NumbaError):
        return error
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    reasons = itertools.takewhile(lambda line: not line.startswith('File "'), lines)
    reason = " ".join([line for line in reasons if line and not line.startswith(_FRAMING)][:3])[:400]
    return TypeError(f"{' or '.join(map(repr, functions))} cannot be compiled: {reason}")


_FRAMING = ("Failed in", "During:", "There are", "- ", "Overload", "With argument")


def _captured(function: Any) -> dict[str, Any]:
    """Values of a function's closure, and of those globals that its code names."""
    values = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }
    for name in _global_names(function.__code__):
        if name not in values and name in function.__globals__:
            values[name] = function.__globals__[name]
    names = _attribute_names(function.__code__)
    return {name: _opened(value, names, ()) for name, value in values.items()}


def _global_names(code: CodeType) -> list[str]:
    names = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _global_names(constant)]
    return [*names, *inner]


_KNOWN_TO_NUMBA = ("math", "cmath", "operator", "numpy", "numba")


class _Attributes(ModuleType):
    """A module with those of its attributes that a function may name, of which Numba is to find other forms."""

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        super().__init__(name)
        vars(self).clear()
        vars(self).update(attributes)


def _opened(value: Any, names: Iterable[str], outer: tuple[ModuleType, ...]) -> Any:
    """A module that Numba does not know, and those in it, as `_Attributes`; any other value as it is.

    `outer` are the modules that it was found in, of which one inside of itself is not opened again.
    """
    known = not isinstance(value, ModuleType) or value.__name__.partition(".")[0] in _KNOWN_TO_NUMBA
    if known or value in outer:
        return value
    outer = (*outer, value)
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return _Attributes(value.__name__, {name: _opened(x, names, outer) for name, x in found.items()})


def _attribute_names(code: CodeType) -> list[str]:
    names = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_ATTR", "LOAD_METHOD")]
    return [*names, *(name for x in code.co_consts if isinstance(x, CodeType) for name in _attribute_names(x))]


def _is_function(value: Any) -> bool:
    return isinstance(checks.plain_function(value), FunctionType)


def _key(function: Any, active: tuple[Any, ...]) -> Any:
    """Equal for functions that do the same."""
    function = checks.plain_function(function)
    if function in active:
        raise TypeError(f"{function.__qualname__!r} must not call itself")
    active = (*active, function)
    captured = tuple((name, _value_key(value, active)) for name, value in sorted(_captured(function).items()))
    return function.__code__, _value_key(function.__defaults__, active), captured


def _value_key(value: Any, active: tuple[Any, ...]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc" or not value.dtype.isnative:
            raise TypeError(f"a captured array must be of numbers in native byte order, got {value.dtype}")
        contents = hashlib.blake2b(np.ascontiguousarray(value), digest_size=32).digest()
        return "array", value.dtype.char, value.shape, contents
    if isinstance(value, tuple):
        return type(value), *(_value_key(x, active) for x in value)
    if _is_function(value):
        return _key(value, active)
    if isinstance(value, _Attributes):
        return tuple((name, _value_key(x, active)) for name, x in sorted(vars(value).items()))
    if isinstance(value, float | complex | np.generic):
        return type(value), repr(value)  # tells -0.0 from 0.0, and NaN is equal to itself
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"a captured {checks.type_name(value)} cannot be: numbers, tuples and arrays can") from None
    return type(value), value


def _rebuilt(function: Any, device: int) -> FunctionType:
    function = checks.plain_function(function)
    values = {name: _form(value, device) for name, value in _captured(function).items()}
    closure = tuple(CellType(values[name]) for name in function.__code__.co_freevars)
    scope = {"__builtins__": builtins, "__name__": function.__module__, **values}
    rebuilt = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    rebuilt.__qualname__, rebuilt.__module__ = function.__qualname__, function.__module__
    return rebuilt


def _form(value: Any, device: int) -> Any:
    """A captured value as Numba takes it on a device."""
    if isinstance(value, np.ndarray):
        return CapturedArray(value, device)
    if _is_function(value):
        from numba import cuda

        return cuda.jit(device=True, inline="always")(_rebuilt(value, device))
    if isinstance(value, _Attributes):
        vars(value).update({name: _form(x, device) for name, x in vars(value).items()})
    return value
