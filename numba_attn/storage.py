"""How caches hold keys and values: as numbers or quantised, sequence by sequence or in pages.

A row is one token of one head.  As numbers, it is those of its dtype.  Quantised, it is bytes: integers, and behind
them what these are to be multiplied by, float32.  It is filled up to whole groups of `GROUP` elements.

With 8 bits a byte is an integer from -127 to 127.  With 4 bits, byte i of the 16 of a group has element i in its lower
half and element i + 16 in its upper half, as n from 0 to 15.  What n means is said by a byte for each block, of which
64 elements have 8: every eighth element is of the same.  These bytes are behind those of all groups.  With k = 0 to 7
in the lower three bits and c = 1 to 31 in the upper five, n means the integer c (2 n + k - 18).  So a block has steps
as fine as its own numbers allow, which reach as far up and down.

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
BLOCKS, TOGETHER = 8, 64  # of so many elements
SHIFTS, COARSEST, MIDDLE = 8, 31, 18  # k is less than the first, c at most the second
LARGEST = {"int8": 127, "int4": COARSEST * (30 + SHIFTS - 1 - MIDDLE)}  # integer


def row_bytes(numbers: str, D: int) -> int:
    """Of a quantised row of D elements."""
    return integer_bytes(numbers, D) + 4


def integer_bytes(numbers: str, D: int) -> int:
    """Of such a row, without what its integers are to be multiplied by."""
    groups = -(-D // GROUP)
    return groups * GROUP if numbers == "int8" else groups * GROUP // 2 + -(-D // TOGETHER) * BLOCKS


def quantize(x: np.ndarray, numbers: str) -> np.ndarray:
    """Rows (..., D) of numbers as (..., row_bytes) of uint8, rounded to the nearest of what can be said.

    This is the specification; caches use `cpu.quantization`, which is faster.

    A row of "int8" is off by half of 1/127 of its largest element at most.  Of "int4", each block has the k with the
    least squared error, and the c with which steps reach its largest and smallest element, or nearly.  What is not
    finite makes its row NaN.
    """
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        return _integers_of_8_bits(x) if numbers == "int8" else _integers_of_4_bits(x)


def _integers_of_8_bits(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=-1, keepdims=True, initial=0) / np.float32(127)
    steps = np.zeros((*x.shape[:-1], integer_bytes("int8", x.shape[-1])), np.float32)
    np.rint(x / _not_zero(scale), out=steps[..., : x.shape[-1]])
    return _packed(np.where(np.isfinite(steps), steps, 0).clip(-127, 127).astype(np.int8).view(np.uint8), scale)


def _integers_of_4_bits(x: np.ndarray) -> np.ndarray:
    rows, D, groups, pieces = x.shape[:-1], x.shape[-1], -(-x.shape[-1] // GROUP), -(-x.shape[-1] // TOGETHER)
    # Filled up with elements of the same block again, as far as there are any: what it means depends on these alone.
    columns, last = np.arange(pieces * TOGETHER), D // TOGETHER * TOGETHER
    again = last + (columns - last) % ((D - last) // BLOCKS * BLOCKS or BLOCKS)
    columns = np.where(columns < D, columns, np.minimum(again, D))
    filled = np.concatenate([x, np.zeros((*rows, 1), np.float32)], axis=-1)[..., columns]
    blocks = filled.reshape(*rows, pieces, TOGETHER // BLOCKS, BLOCKS)
    scale = _coarsest(blocks).min(axis=-1).max(axis=(-2, -1), initial=0)[..., None] / np.float32(COARSEST)
    scale = np.where(np.isfinite(x).all(axis=-1, keepdims=True), scale, np.float32(np.nan))
    divisor = _not_zero(scale)[..., None, None]
    relative = np.where(np.isfinite(divisor), blocks / divisor, np.float32(0))
    coarsest = np.rint(_coarsest(relative)).clip(1, COARSEST)
    best = np.full(coarsest.shape[:-1], np.inf, np.float32)
    codes, found = np.zeros(best.shape, np.uint8), np.zeros(blocks.shape, np.uint8)
    for k in range(SHIFTS):
        c = coarsest[..., k]
        steps = c[..., None, :]
        n = np.rint((relative * (1 / steps) + np.float32(MIDDLE - k)) / 2).clip(0, 15)
        error = np.square((2 * n + (k - MIDDLE)) * steps - relative).sum(axis=-2)
        better = error < best
        best = np.where(better, error, best)
        codes = np.where(better, (8 * c + k).astype(np.uint8), codes)
        found = np.where(better[..., None, :], n.astype(np.uint8), found)
    halves = found.reshape(filled.shape)[..., : groups * GROUP].reshape(*rows, groups, 2, GROUP // 2)
    pairs = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*rows, groups * GROUP // 2)
    return _packed(np.concatenate([pairs, codes.reshape(*rows, pieces * BLOCKS)], axis=-1), scale)


def _coarsest(blocks: np.ndarray) -> np.ndarray:
    """What c would be, for each k: the largest n, 15, is to reach up to the largest number, and 0 to the smallest."""
    high, low = blocks.max(axis=-2, initial=0)[..., None], blocks.min(axis=-2, initial=0)[..., None]
    shifts = np.arange(SHIFTS, dtype=np.float32)
    return np.maximum(high * (1 / (shifts + (30 - MIDDLE))), -low * (1 / (MIDDLE - shifts)))


def _not_zero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale)


def _packed(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    scales = np.where(np.isfinite(scales), scales, np.float32(np.nan)) + np.float32(0)  # never -0.0
    return np.concatenate([integers, np.ascontiguousarray(scales, np.float32).view(np.uint8)], axis=-1)


def dequantize(rows: np.ndarray, numbers: str, D: int) -> np.ndarray:
    """(..., D) float32 of rows (..., row_bytes) of uint8."""
    size, groups = integer_bytes(numbers, D), -(-D // GROUP)
    bytes_, scales = rows[..., :size], np.ascontiguousarray(rows[..., size:]).view(np.float32)
    if numbers == "int8":
        integers = bytes_.view(np.int8)
    else:
        pairs, codes = np.split(bytes_, [groups * GROUP // 2], axis=-1)
        pairs = pairs.reshape(*rows.shape[:-1], groups, GROUP // 2)
        n = np.concatenate([pairs & 15, pairs >> 4], axis=-1).reshape(*rows.shape[:-1], groups * GROUP)
        column = np.arange(groups * GROUP)
        codes = codes[..., column // TOGETHER * BLOCKS + column % BLOCKS].astype(np.int16)
        integers = (2 * n + (codes & 7) - MIDDLE) * (codes >> 3)
    with np.errstate(all="ignore"):  # of rows that nobody has written, too
        return integers[..., :D] * scales


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
