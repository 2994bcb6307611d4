"""What a contiguous and a paged cache have in common: arrays for keys and values, tokens that come in, their checks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numba_attn import checks
from numba_attn.memory import aligned
from numba_attn.storage import QUANTIZED, dequantize, row_bytes

# Of keys and values, (Hkv, 1, D) and (Hkv, 1, Dv); see `numba_attn.storage`.
ChannelScales = tuple[np.ndarray | None, np.ndarray | None]
MOST = int(np.iinfo(np.intp).max)  # of anything in an array


class Tokens(NamedTuple):
    """What is to be appended, checked against a cache."""

    key: np.ndarray  # (B, Hkv, n, D)
    value: np.ndarray  # (B, Hkv, n, Dv)
    counts: np.ndarray  # (B,) int64, how many of the n are for each sequence


def pools(
    leading: tuple[int, int, int], D: int, Dv: int, dtype: np.dtype, quantize: str | None, buffers: Any
) -> tuple[np.ndarray, np.ndarray]:
    """New arrays for keys and values, or the ones given: three axes, then a row."""
    shapes = (*leading, D), (*leading, Dv)
    if quantize is not None:
        shapes = (*leading, row_bytes(quantize, D)), (*leading, row_bytes(quantize, Dv))
        dtype = np.dtype(np.uint8)
    if buffers is not None:
        return buffers_of(buffers, shapes, dtype)
    try:
        return aligned(shapes[0], dtype), aligned(shapes[1], dtype)
    except ValueError as error:
        raise ValueError(
            f"sizes must be those of arrays, got {shapes[0]} and {shapes[1]} of {dtype}: {error}"
        ) from None


def channel_scales_of(given: Any, Hkv: int, sizes: tuple[int, int], quantize: str | None) -> ChannelScales:
    if given is None:
        return None, None
    if quantize is None:
        raise ValueError("channel_scales must be None of a cache that is not quantised")
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"channel_scales must be a pair of arrays (key, value), got {checks.type_name(given)}")
    key, value = (None if x is None else _channels(x, (Hkv, n)) for x, n in zip(given, sizes, strict=True))
    freeze((key, value))
    return key, value


def _channels(given: Any, shape: tuple[int, int]) -> np.ndarray:
    scales = checks.floating_array("channel_scales", given)
    if scales.shape != shape:
        raise ValueError(f"channel_scales must have shape {shape}, got {scales.shape}")
    with np.errstate(over="ignore"):
        scales = scales.astype(np.float32)[:, None]
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise ValueError("channel_scales must be positive and finite, in float32 too, got some that are not")
    return scales


def freeze(scales: ChannelScales) -> None:
    """Make them read-only, which copies and what comes out of a pickle are not."""
    for x in scales:
        if x is not None:
            x.flags.writeable = False


def stored(tokens: Tokens, numbers: str | None, scales: ChannelScales) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values as a cache keeps them."""
    if numbers is None:
        return tokens.key, tokens.value
    key, value = (quantized(x, numbers, own) for x, own in zip((tokens.key, tokens.value), scales, strict=True))
    return key, value


def quantized(x: np.ndarray, numbers: str, scales: np.ndarray | None) -> np.ndarray:
    """Elements (B, Hkv, n, columns) as rows of integers."""
    from numba_attn.cpu import quantization

    return quantization.run(x, numbers, scales)


def restored(rows: np.ndarray, numbers: str, columns: int, scales: np.ndarray | None) -> np.ndarray:
    """Elements of rows of integers, float32."""
    x = dequantize(rows, numbers, columns)
    return x if scales is None else x * scales


def operand(
    name: str, x: Any, dtype: np.dtype, shape: tuple[int, int, int], pools: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Tokens (B, Hkv, n, columns) to be appended, for a shape (B, Hkv, columns); not in the pools that they go to."""
    x = checks.numpy_array(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, as the cache is, got {x.dtype}")
    B, Hkv, columns = shape
    if x.ndim != 4 or (*x.shape[:2], x.shape[3]) != shape:
        raise ValueError(f"{name} must have shape ({B}, {Hkv}, n, {columns}), got {x.shape}")
    return x.copy() if any(np.may_share_memory(x, pool) for pool in pools) else x


def tokens_of(
    key: Any,
    value: Any,
    counts: Any,
    dtype: np.dtype,
    shape: tuple[int, int, int, int],
    pools: tuple[np.ndarray, np.ndarray],
) -> Tokens:
    """What may be appended to sequences of a shape (B, Hkv, D, Dv), if there is room for it."""
    B, Hkv, *sizes = shape
    key, value = (
        operand(name, x, dtype, (B, Hkv, columns), pools)
        for name, x, columns in zip(("key", "value"), (key, value), sizes, strict=True)
    )
    n = key.shape[2]
    if value.shape[2] != n:
        raise ValueError(f"key and value must have the same length, got {n} and {value.shape[2]}")
    return Tokens(key, value, counts_of(counts, B, n))


def counts_of(counts: Any, B: int, n: int) -> np.ndarray:
    """(B,) how many of n rows each sequence has."""
    added = np.full(B, n, np.int64)
    if counts is not None:
        added[:] = checks.integers("counts", counts, (B,), 0, n)
    return added


def size_of(name: str, x: Any, low: int = 0) -> int:
    n = checks.at_least(name, x, low)
    if n > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {n}")
    return n


def dtype_of(dtype: Any, quantize: Any = None) -> np.dtype:
    found = checks.dtype(dtype)
    if quantize is not None:
        if not isinstance(quantize, str) or quantize not in QUANTIZED:
            raise ValueError(f"quantize must be None, 'int8' or 'int4', got {quantize!r}")
        if found.char == "d":
            raise TypeError("dtype must be float32, float16 or bfloat16 of a quantised cache, got float64")
    return found


def buffers_of(buffers: Any, shapes: tuple[tuple[int, ...], ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(buffers, tuple | list) or len(buffers) != 2:
        raise TypeError(f"buffers must be a pair of arrays (key, value), got {checks.type_name(buffers)}")
    views = [checks.on_host("buffers", x) for x in buffers]
    key, value = (np.asarray(checks.numpy_array("buffers", x)) for x in views)
    for x, shape, given in zip((key, value), shapes, views, strict=True):
        if x.dtype != dtype or not given.dtype.isnative:
            raise TypeError(f"buffers must be {dtype}, got {given.dtype}")
        if x.shape != shape:
            raise ValueError(f"buffers must have shapes {shapes[0]} and {shapes[1]}, got {key.shape} and {value.shape}")
        if not x.flags.writeable:
            raise ValueError("buffers must be writeable")
        if checks.overlaps_itself(x):
            raise ValueError(f"buffers must not overlap themselves, got strides {x.strides} for shape {shape}")
    if checks.overlap(key, value):
        raise ValueError("buffers must not share memory with each other")
    return key, value


def indices_of(name: str, x: Any, B: int) -> np.ndarray:
    """Integers in [0, B): one, or a row of any length."""
    x = checks.on_host(name, x)
    n = len(x) if isinstance(x, list | tuple) else np.size(x)  # of lists of different lengths NumPy knows none
    return np.asarray(checks.integers(name, x if n else [], (n,), 0, B - 1))


def read_only(x: np.ndarray) -> np.ndarray:
    view = x[...]
    view.flags.writeable = False
    return view
