"""Which keys the rows of a block may attend to: intervals, masks and block masks, on one tile."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from numba_attn.block_mask import EMPTY, FULL, PARTIAL
from numba_attn.cpu import mask_tiles
from numba_attn.cpu.jit import device
from numba_attn.cpu.narrow import MASKS, STORED
from numba_attn.cpu.pointers import get, moved
from numba_attn.cpu.simd import BYTES

# A matrix in memory: the address of its first element, the bytes from row to row and from column to column.
Matrix = namedtuple("Matrix", "data row step")
# Where the rows of a sequence stand on its keys, see masks.KeyIntervals.
Position = namedtuple("Position", "offset kv_length left right")

# A mask is known by the number of its kind, see narrow.MASKS.
BOOLEAN = MASKS.index("?")
MASK_BYTES = np.array([BYTES[STORED[name]] for name in MASKS])


@device
def visible(first, end, position):
    """The keys that some, and that every one, of the rows [first, end) may attend to."""
    start, last = first + position.offset, end - 1 + position.offset
    some_low = max(0, start - position.left)
    some_high = min(position.kv_length, last + position.right + 1)
    every_low = max(0, last - position.left)
    every_high = min(position.kv_length, start + position.right + 1)
    return some_low, some_high, every_low, every_high


@device
def glance(mask, kind, rows, to_head, heads, n):
    """What a boolean mask with contiguous keys leaves of a tile; PARTIAL, which says nothing, for any other.

    Of so many rows of each of the heads, whose masks are `to_head` bytes apart.
    """
    if mask.step != 1 or kind != BOOLEAN:
        return PARTIAL
    true, seen = 0, rows if mask.row != 0 else 1
    for i in range(seen * heads):
        true += mask_tiles.count_true(moved(mask.data, i // seen * to_head + i % seen * mask.row), n)
        if 0 < true < (i + 1) * n:
            return PARTIAL
    return FULL if true else EMPTY


@device
def none_true(mask, kind, rows, to_head, heads, first):
    """Whether a boolean mask, and no other, excludes the TRIM keys from `first` for all rows of all heads.

    However it lies in memory: what is trimmed decides in which order a row is summed.
    """
    if kind != BOOLEAN:
        return False
    seen = rows if mask.row != 0 else 1
    for h in range(heads):
        if mask.step == 1:
            if mask_tiles.any_true(moved(mask.data, h * to_head + first), mask.row, seen):
                return False
        else:
            for i in range(seen):
                for j in range(first, first + mask_tiles.TRIM):
                    if get(mask.data, h * to_head + i * mask.row + j * mask.step) != 0:
                        return False
    return True


@device
def mask_tile(mask, kind, rows, to_head, heads, n, stride, lanes, bias):
    """Write what the mask adds to a tile of scores of the `rows` of some heads to `bias`; what it leaves of it.

    A key has `stride` elements.
    """
    count, width, several = rows * heads, max(1, stride // lanes), stride < lanes
    alike = count == 1 or (mask.row == 0 and (to_head == 0 or heads == 1))
    if alike and several:
        vectors = (n * stride + lanes - 1) // lanes
        end = vectors * (lanes // stride)
        mask_tiles.mask_line(bias, mask.data, kind, mask.step, n, end)
        mask_tiles.repeat(bias, end, stride)
        return mask_tiles.classify(1, bias, vectors)
    if alike:
        mask_tiles.mask_keys(width, bias, mask.data, kind, mask.step, n)
    else:
        whole = n // lanes * lanes if mask.step == MASK_BYTES[kind] else 0
        mask_tiles.mask_rows(width, bias, mask.data, kind, mask.row, to_head, rows, count, whole)
        mask_tiles.mask_elements(width, bias, mask.data, kind, mask.row, to_head, mask.step, rows, count, whole, n)
    # One key tells most often: only where it does not, all are looked at.
    kept = mask_tiles.classify(width, bias, 1)
    if kept != PARTIAL:
        kept = mask_tiles.classify(width, bias, n)
    if several:
        mask_tiles.gather(bias, n, stride)
    return kept


@device
def shrink(states, rows_of_tile, keys_of_tile, first, end, start, stop):
    """The part of the keys [start, stop) that a block mask leaves to the rows [first, end), and how much of it."""
    low, high, kept = stop, start, FULL
    for column in range(start // keys_of_tile, (stop + keys_of_tile - 1) // keys_of_tile):
        some, every = False, True
        for row in range(first // rows_of_tile, (end + rows_of_tile - 1) // rows_of_tile):
            some |= states[row, column] != EMPTY
            every &= states[row, column] == FULL
        if some:
            # What is empty between two that are not will be masked.
            if low < stop and column * keys_of_tile > high:
                kept = PARTIAL
            low = min(low, max(start, column * keys_of_tile))
            high = min(stop, (column + 1) * keys_of_tile)
            if not every:
                kept = PARTIAL
    return low, high, kept if low < high else EMPTY
