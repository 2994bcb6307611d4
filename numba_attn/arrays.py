"""The arrays of a call, of whatever library: read where they lie, and results as arrays of the caller's library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from numba_attn.device_array import DeviceArray
from numba_attn.libraries import Library, library_of, type_name

Array = TypeVar("Array")  # whatever array a caller has
OPERANDS = ("query", "key", "value", "attn_mask", "out")
_PLAIN = (np.ndarray, type(None))


# A call ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom results are for."""

    library: Library | None  # None is NumPy
    like: Any  # an array of the caller's
    out: Any  # where the caller wants the result, if it was told
    view: Any  # the same memory, as the problem has it
    on_device: bool

    def give(self, results: Any) -> Any:
        """An array as one of the caller's library; None, and tuples of arrays, likewise."""
        if results is None or self.library is None:
            return results
        if isinstance(results, tuple):
            given = map(self.give, results)
            return type(results)._make(given) if hasattr(results, "_make") else tuple(given)
        if results is self.view:
            self.library.wrote(self.out)
            return self.out
        return results.owner if isinstance(results, DeviceArray) else self.library.give(self.like, results)


NUMPY = Caller(None, None, None, None, False)


def adopt(call: dict[str, Any], operands: tuple[str, ...] = OPERANDS, on_host: str | None = None) -> Caller:
    """Put views in the place of the arrays of a call, which are of one library and on one device; the first leads.

    A mask may be NumPy's beside arrays in host memory.  What is no array is left to the checks of the call.  `on_host`
    says why arrays must be in host memory, if they must.
    """
    for name in operands:
        if type(call[name]) not in _PLAIN:
            break
    else:
        return NUMPY
    leader, *others = operands
    like, out = call[leader], call.get("out")
    library = library_of(like)
    for name in others:
        x = call[name]
        if x is None or library_of(x) is library or (name == "attn_mask" and isinstance(x, np.ndarray)):
            continue
        if library is not None or library_of(x) is not None:
            raise TypeError(
                f"{leader} and {name} must be arrays of one library, got {type_name(like)} and {type_name(x)}"
            )
    if library is None:
        return NUMPY
    if out is not None and library.immutable:
        raise TypeError(f"out must be an array that can be written to, got {type_name(out)}, which is immutable")
    for name in operands:
        call[name] = view(name, call[name])
    first = call[leader]
    if on_host is not None and isinstance(first, DeviceArray):
        raise TypeError(f"{leader} must be in host memory, {on_host}, got {type_name(like)} on {_place(first)}")
    for name in others:
        if call[name] is not None and not _together(first, call[name]):
            raise TypeError(f"{leader} and {name} must be on one device, got {_place(first)} and {_place(call[name])}")
    return Caller(library, like, out, call.get("out"), isinstance(first, DeviceArray))


def view(name: str, x: Any) -> Any:
    """A NumPy array or `DeviceArray` over the memory of an array of another library; anything else as it is."""
    library = library_of(x)
    if library is None:
        return x
    try:
        return library.view(x)
    except Exception as error:  # ours, or whatever the library raises for an array that it cannot show
        kind = NotImplementedError if isinstance(error, NotImplementedError) else TypeError
        raise kind(f"{name} must be an array that can be read, got {type_name(x)}: {error}") from error


def _together(one: Any, other: Any) -> bool:
    if isinstance(one, DeviceArray) and isinstance(other, DeviceArray):
        return one.device == other.device or None in (one.device, other.device)
    return isinstance(one, DeviceArray) is isinstance(other, DeviceArray)


def _place(x: Any) -> str:
    if not isinstance(x, DeviceArray):
        return "host memory"
    return "a CUDA device" if x.device is None else f"CUDA device {x.device}"


# Calls like an earlier one --------------------------------------------------------------------------------------------


def located(query: Any, key: Any, value: Any, out: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Of arrays of one class on CUDA devices, what is the same in calls alike, and what a `repeats.Repeat` takes.

    None if that cannot be found at once, as `Library.view` would find it, or the arrays name different streams.
    """
    kind, library = type(query), library_of(query)
    if library is None or type(key) is not kind or type(value) is not kind or type(out) not in (kind, type(None)):
        return None
    q, k, v = library.located(query), library.located(key), library.located(value)
    if q is None or k is None or v is None:
        return None
    stream = library.stream(query)
    one_stream = (None, stream)
    if k[2] not in one_stream or v[2] not in one_stream:
        return None
    if out is None:
        return (kind, q[0], k[0], v[0]), (library, query, None, (q[1], k[1], v[1]), stream)
    o = library.located(out)
    if o is None or o[2] not in one_stream:
        return None
    return (kind, q[0], k[0], v[0], o[0]), (library, query, out, (q[1], k[1], v[1], o[1]), stream)
