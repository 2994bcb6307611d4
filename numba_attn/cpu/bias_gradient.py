"""The gradients of what is added to scores, an additive mask and ALiBi slopes, from those of the scores of each tile.

    d mask[...] = sum of dS over all that the mask was broadcast to,   d slope[h] = -sum of dS |p - j|

A mask with rows is added to where it lies, or a small one to some copies of it: tasks that use the same are done one
after the other, see `gradient_tasks`.  Of a mask without, and of slopes, each task has sums of its own, which are added
up in order.  So no two write to one place, and every sum has one order.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import types

from numba_attn.cpu import gradient_tiles
from numba_attn.cpu.gradient_tasks import Added, rows_of_sums
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import address, get, moved, put
from numba_attn.cpu.score import element
from numba_attn.cpu.visible import Matrix

# What is written, each empty if not wanted: the gradient of a mask with rows (places, heads, rows, keys), and the place
# in its batch of each sequence and key-value head (B, Hkv); sums of tasks for a mask without rows, (rows of their sums,
# query heads of a key-value head); and for slopes, (tasks, such heads).
Bias = namedtuple("Bias", "mask places keys slopes")


# In the kernel --------------------------------------------------------------------------------------------------------


@device
def add_tile(bias, number, task, head, member, tile, row, rows, sizes, ds, ds_row, memory, at):
    """Add the gradients ds of a tile's scores, rows `ds_row` bytes apart, to those of what was added to them.

    The head is the `member`-th of those that share a key-value head, whose task of that number this is.
    """
    width, n = (rows + sizes.lanes - 1) // sizes.lanes, tile.stop - tile.start
    itemsize, sums = memory.itemsize, element(memory, at.sums)
    if bias.mask.size:
        here = matrix_of(bias.mask, bias.places[head.b, task[1]], head.h)
        add_to_mask(here, tile, row, rows, width, ds, ds_row, sums, itemsize)
    if bias.keys.size:
        to = moved(address(bias.keys), (task[4] + tile.start - task[5]) * bias.keys.strides[0] + member * itemsize)
        gradient_tiles.sum_rows(width, ds, ds_row, n, to, bias.keys.strides[0])
    if bias.slopes.size:
        gradient_tiles.sum_distances(width, ds, ds_row, n, row + head.position.offset - tile.start, sums)
        total = 0.0
        for lane in range(rows):
            total += get(sums, lane * itemsize)
        bias.slopes[number, member] -= total


@device
def add_to_mask(here, tile, row, rows, width, ds, ds_row, sums, itemsize):
    """Add the gradients of a tile's scores to the mask's; `sums` is memory for one row of a block."""
    to = moved(here.data, row * here.row + tile.start * here.step)
    if here.step != 0:
        gradient_tiles.add_transposed(width, ds, ds_row, rows, tile.stop - tile.start, to, here.row)
        return
    gradient_tiles.sum_keys(width, ds, ds_row, tile.stop - tile.start, sums)
    for lane in range(rows):
        at = lane * here.row
        put(to, at, get(to, at) + get(sums, lane * itemsize))


@device
def matrix_of(mask, place, head):
    """The part of a mask's gradient of one head: an axis of length 1 is the same element for every index."""
    offset = place * mask.strides[0] + (head * mask.strides[1] if mask.shape[1] > 1 else 0)
    return Matrix(moved(address(mask), offset), mask.strides[2], mask.strides[3] if mask.shape[3] > 1 else 0)


# From Python ----------------------------------------------------------------------------------------------------------


def bias_types(element_type: types.Type) -> types.Type:
    """The type of Bias."""
    mask, sums = types.Array(element_type, 4, "C"), types.Array(element_type, 2, "C")
    return types.NamedTuple([mask, types.Array(types.int64, 2, "C"), sums, types.Array(types.float64, 2, "C")], Bias)


def has_rows(shape: tuple[int, ...]) -> bool:
    """Of a mask (places, heads, rows, keys)."""
    return shape[2] > 1


def bias_of(
    mask: np.ndarray | None,
    slopes: np.ndarray | None,
    added: Added | None,
    tasks: np.ndarray,
    group: int,
    dtype: np.dtype,
) -> Bias:
    """What a kernel writes for the gradients of a mask (places, heads, rows, keys) and of slopes, None if not wanted.

    Where a mask with rows is `added`, also if its gradient is not wanted.
    """
    written = mask is not None and has_rows(mask.shape)
    to, places = np.zeros((0, 0, 0, 0), dtype), np.zeros((0, 0), np.int64)
    if written:
        assert mask is not None and added is not None
        to, places = mask, added.places
        if added.copies > 1:
            to = np.zeros((len(mask) * added.copies, *mask.shape[1:]), dtype)
    return Bias(
        to,
        places,
        np.zeros((0 if mask is None or written else rows_of_sums(tasks), group), dtype),
        np.zeros((0 if slopes is None else len(tasks), group)),
    )


def finish(
    bias: Bias, mask: np.ndarray | None, slopes: np.ndarray | None, places: np.ndarray, tasks: np.ndarray
) -> None:
    """Add up the sums of tasks, in order, to a mask without rows and to slopes (1 or B, Hq), and copies of a mask."""
    if mask is not None and bias.mask.size > mask.size:
        np.sum(bias.mask.reshape(len(mask), -1, *mask.shape[1:]), axis=1, out=mask)
    if slopes is None and not bias.keys.size:
        return
    group = bias.slopes.shape[1]
    for number, (b, shared, _, _, row, low, high, *_) in enumerate(tasks.tolist()):
        heads = slice(shared * group, (shared + 1) * group)
        if slopes is not None:
            slopes[b if len(slopes) > 1 else 0, heads] += bias.slopes[number]
        if mask is not None and bias.keys.size:
            sums = bias.keys[row : row + high - low].T  # (group, keys)
            to = mask[places[b], heads if mask.shape[1] > 1 else slice(1), 0]
            if mask.shape[3] > 1:
                to = to[:, low:high]
            else:
                sums = sums.sum(axis=1, keepdims=True)
            to += sums if mask.shape[1] > 1 else sums.sum(axis=0)
