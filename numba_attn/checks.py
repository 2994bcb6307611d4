"""Checks of single arguments, each an error that names the argument, what came and what was expected."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from numba_attn import arrays
from numba_attn.device_array import DeviceArray
from numba_attn.libraries import type_name as type_name

LAYOUTS = ("BHLD", "BLHD")


def array(name: str, x: Any) -> Any:
    """A NumPy array in native byte order, over the memory of an array of any library; or a `DeviceArray`."""
    if type(x) is not np.ndarray:
        x = arrays.view(name, x)
        if type(x) is DeviceArray:
            return x
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array, got {type_name(x)}")
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} must not be a masked array: pass its data, and the mask as attn_mask")
        x = np.asarray(x)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def numpy_array(name: str, x: Any) -> np.ndarray:
    found: np.ndarray = array(name, on_host(name, x))
    return found


def on_host(name: str, x: Any) -> Any:
    """An array of another library as NumPy's, if it is in host memory; what is no array as it is."""
    if type(x) is np.ndarray:
        return x
    found = arrays.view(name, x)
    if type(found) is DeviceArray:
        raise TypeError(f"{name} must be in host memory, where it is looked at, got {type_name(x)} on a CUDA device")
    return found


def floating_array(name: str, x: Any) -> np.ndarray:
    """A float32, float64, float16 or bfloat16 array, in native byte order."""
    found: np.ndarray = floating(name, numpy_array(name, x))
    return found


def floating(name: str, x: Any) -> Any:
    """An array whose dtype is one of those of attention."""
    if x.dtype.char not in "fde" and not is_bfloat16(x.dtype):
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
    return x


def output_array(out: Any, shape: tuple[int, ...], dtype: np.dtype, like: str) -> Any:
    """An array that a result of that shape, and of the dtype of the argument `like`, can be written to."""
    if not isinstance(out, np.ndarray | DeviceArray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a NumPy array, got {type_name(out)}")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out must be {dtype}, as {like} is, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable")
    if overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got strides {out.strides} for shape {out.shape}")
    return out


def layout(x: Any) -> str:
    if not isinstance(x, str) or x not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {x!r}")
    return str(x)


def heads_first(x: np.ndarray, layout: str) -> np.ndarray:
    """A view (*batch, H, L, D) of an array in that layout; an array without a head axis has one head."""
    if x.ndim == 2:
        return x[None]
    return x if layout == "BHLD" else x.swapaxes(-3, -2)


def dtype(x: Any, expected: str = "float32, float64, float16 or bfloat16") -> np.dtype:
    """A floating-point dtype, in native byte order."""
    try:
        found = np.dtype(x)
    except TypeError:
        found = None
    if x is None or found is None or not (found.char in "fde" or is_bfloat16(found)) or not found.isnative:
        raise TypeError(f"dtype must be {expected}, got {x!r}")
    return found


def is_bfloat16(dtype: np.dtype) -> bool:
    """Whether a dtype is ml_dtypes' bfloat16, without importing that."""
    return dtype.itemsize == 2 and dtype.name == "bfloat16"


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {type_name(x)}")
    return bool(x)


def number(name: str, x: Any) -> float:
    one_of_numpy = isinstance(x, np.generic | np.ndarray)
    if (
        isinstance(x, bool | str | np.ma.MaskedArray)
        or (one_of_numpy and (x.ndim or not (x.dtype.kind in "iuf" or is_bfloat16(x.dtype))))
        or not hasattr(type(x), "__float__")
    ):
        raise TypeError(f"{name} must be a real number, got {type_name(x)}")
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf
    except ValueError as error:  # a signaling NaN
        raise ValueError(f"{name} must be a number: {error}") from None


def as_array(name: str, x: Any, expected: str = "be an array") -> np.ndarray:
    """A NumPy array of lists, or of an array in host memory; `expected` is what the error of other lists says."""
    x = on_host(name, x)
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array")
    try:
        return np.asarray(x)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} must {expected}: {error}") from None


def integer(name: str, x: Any) -> int:
    if isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be integers, got {type_name(x)}")
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be integers, got {type_name(x)}") from None


def at_least(name: str, x: Any, low: int) -> int:
    n = integer(name, x)
    if n < low:
        raise ValueError(f"{name} must be {low} or more, got {n}")
    return n


def integers(name: str, x: Any, batch: tuple[int, ...], low: int, high: int) -> Any:
    """An integer, or one for each sequence of the batch as a flat array, within [low, high]."""
    if type(x) is int:
        values: Any = x
        smallest = largest = x
    else:
        x = on_host(name, x)
        values = as_array(name, x, f"be an integer or have shape {batch or (1,)}")
        if values.size == 0 and isinstance(x, list | tuple):
            values = values.astype(np.int64)
        if values.dtype.kind not in "iu":
            if not beyond_64_bits(x):
                raise TypeError(f"{name} must be integers, got {type_name(x)} of {values.dtype}")
            values = np.asarray(x, object)
        if values.ndim and values.shape != batch and values.shape != (math.prod(batch),):
            raise ValueError(f"{name} must be an integer or have shape {batch or (1,)}, got shape {values.shape}")
        if values.size == 0:
            return values.reshape(-1)
        values = values.reshape(-1)
        # Of a few, which is most calls, NumPy's functions would take longer than a small problem.
        extremes = values.tolist() if values.size <= 32 else (values.min(), values.max())
        smallest, largest = int(min(extremes)), int(max(extremes))
    if smallest < low or largest > high:
        raise ValueError(f"{name} must be between {low} and {high}, got {smallest if smallest < low else largest}")
    return values


def out_of_positions(name: str, offset: Any, n: int, positions: int, unplaced: str) -> str | None:
    """What is wrong with n rows from each offset on, where rotary tables have so many positions; None if nothing is.

    `unplaced` says what rows before the first position would need.
    """
    first, last = int(np.min(offset, initial=1 << 62)), int(np.max(offset, initial=0)) + n
    if first < 0:
        return f"{unplaced}, got {first}"
    if last > positions:
        return f"rotary must have a position for each row, got {positions}, {name} needs {last}"
    return None


def beyond_64_bits(x: Any) -> bool:
    """Whether these are Python's integers of which one is so large that NumPy has no integers for all of them."""
    exact = np.asarray(x, object)
    return all(type(n) is int for n in exact.flat) and any(n.bit_length() > 63 for n in exact.flat)


def plain_function(function: Any) -> Any:
    """The Python function behind one of Numba's; any other as it is."""
    return getattr(function, "py_func", function)


def parameters(name: str, function: Any, expected: tuple[str, ...]) -> None:
    """A Python function takes as many arguments as expected, all by position."""
    code = function.__code__
    if code.co_argcount != len(expected) or code.co_kwonlyargcount or code.co_flags & 0x0C:
        raise TypeError(
            f"{name} must take {len(expected)} arguments ({', '.join(expected)}), "
            f"got {code.co_name!r} with {code.co_argcount}"
        )


def overlap(a: Any, b: Any) -> bool:
    a, b = (x.places() if type(x) is DeviceArray else x for x in (a, b))
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=1_000_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(x: np.ndarray | DeviceArray) -> bool:
    """Whether two elements may be at one address (never a wrong no; a wrong yes only for very odd strides)."""
    if x.flags.c_contiguous or x.size == 0:
        return False
    reach = x.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False
