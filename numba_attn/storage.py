"""How caches hold keys and values: as numbers or quantised, sequence by sequence or in pages.

A row is one token of one head.  As numbers, it is those of its dtype.  Quantised, it is bytes: integers, each group of
`GROUP` of which (all of the head at 8 bits) is to be multiplied by a scale, and behind them these scales, float32.
With 8 bits a byte is an integer from -127 to 127.  With 4 bits, byte i of the 16 of a group has element i in its lower
half and element i + 16 in its upper half, as integers from -8 to 7 plus 8.  Groups are filled up with zeros.

Before that elements may be divided by scales of their channels, (Hkv, 1, D): some channels of keys are far larger than
others, and would leave few steps for these (Liu et al., "KIVI", 2024).  These scales are not in the rows: with Q times
those of keys, and the output times those of values, attention to the rows as they are is attention to the elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GROUP = 32
QUANTIZED = ("int8", "int4")


def row_bytes(numbers: str, D: int) -> int:
    """Of a quantised row of D elements."""
    groups = -(-D // GROUP)
    return groups * GROUP + 4 if numbers == "int8" else groups * (GROUP // 2 + 4)


def quantize(x: np.ndarray, numbers: str) -> np.ndarray:
    """Rows (..., D) of numbers as (..., row_bytes) of uint8, rounded to the nearest of what can be said.

    A row of "int8" has one scale, and is off by half of 1/127 of its largest element at most.  Of "int4", the scale of
    each group is the one with the least squared error of a few: -8 for the largest element, or a little less than that.
    What is not finite makes its row, or group, NaN.
    """
    groups = -(-x.shape[-1] // GROUP)
    padded = np.zeros((*x.shape[:-1], groups * GROUP), np.float32)
    padded[..., : x.shape[-1]] = x
    if numbers == "int8":
        scale = np.abs(padded).max(axis=-1, keepdims=True, initial=0) / np.float32(127)
        return _packed(_steps(padded, scale, -127, 127).view(np.uint8), scale)
    grouped = padded.reshape(*x.shape[:-1], groups, GROUP)
    at = np.abs(grouped).argmax(axis=-1, keepdims=True) if x.size else np.zeros((*grouped.shape[:-1], 1), int)
    extreme = np.take_along_axis(grouped, at, axis=-1)
    with np.errstate(all="ignore"):
        # Relative to the largest element, so that no square is too large or too small.
        relative = grouped / np.where(extreme == 0, np.float32(1), extreme)
    best, scale = np.full_like(extreme, np.inf), extreme / np.float32(-8)
    steps = np.zeros(grouped.shape, np.int8)
    for shrink in (1.0, 0.93, 0.86, 0.79):
        step = np.float32(shrink / -8)
        found = _steps(relative, step, -8, 7)
        with np.errstate(all="ignore"):
            error = np.square(found * step - relative).sum(axis=-1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, extreme * step, scale)
        steps = np.where(better, found, steps)
    halves = (steps + 8).astype(np.uint8)
    pairs = halves[..., : GROUP // 2] | halves[..., GROUP // 2 :] << 4
    return _packed(pairs.reshape(*x.shape[:-1], groups * GROUP // 2), scale[..., 0])


def _steps(x: np.ndarray, scale: Any, least: int, most: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        steps = np.rint(x / np.where(scale == 0, np.float32(1), scale))
    return np.where(np.isfinite(steps), steps, 0).clip(least, most).astype(np.int8)


def _packed(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    scales = np.where(np.isfinite(scales), scales, np.float32(np.nan))
    return np.concatenate([integers, np.ascontiguousarray(scales, np.float32).view(np.uint8)], axis=-1)


def dequantize(rows: np.ndarray, numbers: str, D: int) -> np.ndarray:
    """(..., D) float32 of rows (..., row_bytes) of uint8."""
    groups = -(-D // GROUP)
    split = groups * (GROUP if numbers == "int8" else GROUP // 2)
    integers, scales = rows[..., :split], np.ascontiguousarray(rows[..., split:]).view(np.float32)
    with np.errstate(all="ignore"):  # of rows that nobody has written, too
        if numbers == "int8":
            return integers.view(np.int8)[..., :D] * scales
        halves = integers.reshape(*rows.shape[:-1], groups, GROUP // 2)
        steps = np.concatenate([halves & 15, halves >> 4], axis=-1).astype(np.float32) - 8
        return (steps * scales[..., None]).reshape(*rows.shape[:-1], groups * GROUP)[..., :D]


@dataclass(frozen=True, slots=True)
class Storage:
    """Keys and values of B sequences as a cache holds them: what `Problem` takes instead of two arrays."""

    key: np.ndarray  # (B, Hkv, rows, columns), or (pages, Hkv, rows of a page, columns)
    value: np.ndarray  # likewise; the columns of both are elements, or bytes of quantised rows
    numbers: str | None  # one of QUANTIZED, or None: those of the dtype of the arrays
    D: int
    Dv: int
    Lk: int  # keys of each sequence, valid or not
    pages: np.ndarray | None = None  # (B, n) int64, the pages of each sequence: n * rows of a page are Lk or more

    @property
    def form(self) -> tuple[Any, ...]:
        """All but what is in it, and which pages."""
        key, value = self.key, self.value
        layout = key.shape, key.strides, key.dtype, value.shape, value.strides, value.dtype
        return (*layout, self.numbers, self.D, self.Dv, self.Lk, self.pages is None)

    def dense(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys (Hkv, Lk, D) and values (Hkv, Lk, Dv) of a sequence, copied if they are quantised or in pages."""
        return self._dense(self.key, b, self.D), self._dense(self.value, b, self.Dv)

    def _dense(self, x: np.ndarray, b: int, columns: int) -> np.ndarray:
        if self.pages is None:
            rows: Any = x[b, :, : self.Lk]
        else:
            pages = x[self.pages[b]]  # (n, Hkv, rows of a page, columns)
            rows = pages.swapaxes(0, 1).reshape(x.shape[1], len(pages) * x.shape[2], x.shape[3])[:, : self.Lk]
        return rows if self.numbers is None else dequantize(rows, self.numbers, columns)
