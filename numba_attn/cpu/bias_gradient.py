"""The gradients of what is added to scores, an additive mask and ALiBi slopes, in a second pass over the scores.

    d mask[...] = sum of dS over all that the mask was broadcast to,   d slope[h] = -sum of dS |p - j|

A task is a part of the mask, of some keys or of some rows; it goes through all heads, sequences and rows that have used
that part, in order.  So no two write to one place, and every sum has one order.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
from numba import prange, types

from numba_attn.block_mask import EMPTY
from numba_attn.cpu import gradient_tiles, launch, pack
from numba_attn.cpu.jit import device, kernel, parallel_kernel, through_pointer
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.plan import WIDEST
from numba_attn.cpu.pointers import address, align_stack, get, moved, put
from numba_attn.cpu.results import column_of, read
from numba_attn.cpu.score import NO_NOTES, Call, Sizes, call_types, element, head_of, matrix, select
from numba_attn.cpu.score_gradients import (
    GradientArrays,
    gradient_types,
    load_keys,
    load_lse,
    load_values,
    padded,
    score_gradients,
)
from numba_attn.cpu.stored import in_place
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.visible import Matrix, visible

# What is written: mask (places in the batch, heads, rows, keys), empty if not wanted, each axis full or 1; slopes
# (parts, B, Hq) float64, empty if not wanted.  members (B, 1): the sequences, those of one place of the mask together,
# which are from firsts (places + 1, 1) on.
Bias = namedtuple("Bias", "mask slopes members firsts")
# A part of the mask: its number, its place in the mask's batch, rows [low_row, high_row) and keys [low_key, high_key).
Part = namedtuple("Part", "number place low_row high_row low_key high_key")
# How the problem is cut: keys of a key tile, query rows of a row block, lanes of a vector; heads of the mask that are
# apart, rows and keys of a part, parts.
Cut = namedtuple("Cut", "keys block lanes heads part_rows part_keys parts")
# Where things are in a worker's memory, in elements.
Memory = namedtuple(
    "Memory", "scores bias keep growth derivative p ds zero one low high lse delta cuts sums qt gt k clean v size"
)

KEYS = 128  # of a key tile
PART = 512  # keys or rows of a part of the mask


@device
def memory_map(sizes):
    keys, block, lanes = sizes.keys, sizes.block, sizes.lanes
    D, Dv = (sizes.D + lanes - 1) // lanes * lanes, (sizes.Dv + lanes - 1) // lanes * lanes
    tile = keys * block
    vectors = 7 * tile
    rows = vectors + 8 * block
    copies = rows + block * (sizes.D + sizes.Dv)
    return Memory(
        scores=0,
        bias=tile,
        keep=2 * tile,
        growth=3 * tile,
        derivative=4 * tile,
        p=5 * tile,
        ds=6 * tile,
        zero=vectors,
        one=vectors + block,
        low=vectors + 2 * block,
        high=vectors + 3 * block,
        lse=vectors + 4 * block,
        delta=vectors + 5 * block,
        cuts=vectors + 6 * block,
        sums=vectors + 7 * block,
        qt=rows,
        gt=rows + block * sizes.D,
        k=copies,
        clean=copies + keys * D,
        v=copies + 2 * keys * D,
        size=copies + keys * (2 * D + Dv),
    )


@device
def load_block(head, arrays, sequences, gradients, row, rows, sizes, memory, at):
    """Put what is needed of a row block in memory; delta has been written by the first pass."""
    lanes, q, offsets = sizes.lanes, head.q, gradients.offsets
    g, lse = matrix(gradients.grad_out, offsets[head.b, 0], head.h), sequences.offsets[head.b, 5]
    width = (rows + lanes - 1) // lanes
    pack.transpose(width, moved(q.data, row * q.row), q.row, q.step, rows, sizes.D, element(memory, at.qt))
    pack.transpose(width, moved(g.data, row * g.row), g.row, g.step, rows, sizes.Dv, element(memory, at.gt))
    load_lse(column_of(arrays.lse, lse, head.h), row, rows, lanes, memory, at.lse)
    delta = column_of(gradients.delta, offsets[head.b, 2], head.h)
    for lane in range(rows):
        memory[at.delta + lane] = read(delta, row + lane)


@device
def add_to_mask(mask, place, head, tile, row, rows, across, ds, sums, itemsize):
    """Add the gradients of a tile's scores, rows of `across` lanes, to the mask's at their place.

    `sums` is memory for one of these rows.
    """
    here, n, width = matrix_of(mask, place, head), tile.stop - tile.start, across * itemsize // VECTOR_BYTES
    to = moved(here.data, row * here.row + tile.start * here.step)
    if here.row != 0 and here.step != 0:
        gradient_tiles.add_transposed(width, ds, rows, n, to, here.row)
    elif here.step == 0:
        gradient_tiles.sum_keys(width, ds, n, sums)
        for lane in range(rows):
            at = lane * here.row
            put(to, at, get(to, at) + get(sums, lane * itemsize))
    else:
        for key in range(n):
            at = key * here.step
            for lane in range(rows):
                put(to, at, get(to, at) + get(ds, (key * across + lane) * itemsize))


@device
def matrix_of(mask, place, head):
    """The part of a mask's gradient of one head: an axis of length 1 is the same element for every index."""
    offset = place * mask.strides[0] + (head * mask.strides[1] if mask.shape[1] > 1 else 0)
    return Matrix(
        moved(address(mask), offset),
        mask.strides[2] if mask.shape[2] > 1 else 0,
        mask.strides[3] if mask.shape[3] > 1 else 0,
    )


@device
def sum_of_distances(tile, position, row, rows, across, ds, sums, itemsize):
    """The sum of a tile's gradients, each times how far its query is from its key; `sums` is memory for one row."""
    distance, total = row + position.offset - tile.start, 0.0
    gradient_tiles.sum_distances(across * itemsize // VECTOR_BYTES, ds, tile.stop - tile.start, distance, sums)
    for lane in range(rows):
        total += get(sums, lane * itemsize)
    return total


@device
def add_head(bias, part, head, gradients, arrays, sequences, settings, sizes, memory, at):
    """Add a head's part of the gradients of what is added to scores."""
    keys, block, lanes, itemsize = sizes.keys, sizes.block, sizes.lanes, memory.itemsize
    k, v = in_place(head.k, memory), in_place(head.v, memory)
    p, ds, sums = element(memory, at.p), element(memory, at.ds), element(memory, at.sums)
    for number in range((part.high_row - part.low_row + block - 1) // block):
        row = part.low_row + number * block
        rows = min(block, part.high_row - row)
        across, loaded = padded(rows, lanes), False
        low, high, _, _ = visible(row, row + rows, head.position)
        low, high = max(low, part.low_key), min(high, part.high_key)
        for tile in range(low // keys, (high + keys - 1) // keys):
            start, stop = max(tile * keys, low), min((tile + 1) * keys, high)
            here = select(head, settings, row, rows, 1, start, stop, False, sizes, memory, at)
            if here.kept == EMPTY:
                continue
            if not loaded:
                load_block(head, arrays, sequences, gradients, row, rows, sizes, memory, at)
                loaded = True
            n = here.stop - here.start
            k_tile, _ = load_keys(k, here.start, n, sizes, memory, at)
            v_tile = load_values(v, here.start, n, sizes, memory, at)
            score_gradients(
                head, settings, here, row, rows, sizes, False, k_tile, v_tile, element(memory, at.qt),
                element(memory, at.gt), element(memory, at.lse), element(memory, at.delta), p, ds, across * itemsize,
                memory, at,
            )  # fmt: skip
            if bias.mask.size:
                add_to_mask(bias.mask, part.place, head.h, here, row, rows, across, ds, sums, itemsize)
            if bias.slopes.size:
                total = sum_of_distances(here, head.position, row, rows, across, ds, sums, itemsize)
                bias.slopes[part.number, head.b, head.h] -= total


@kernel
def differentiate_bias(memory, worker, counters, bias, gradients, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none."""
    align_stack()
    Hq = arrays.q.shape[0]
    sizes = Sizes(arrays.q.shape[2], arrays.out.shape[2], cut.keys, cut.block, cut.lanes)
    at, nothing = memory_map(sizes), memory.dtype.type(0)
    pack.fill_lanes(element(memory, at.zero), nothing, cut.block // cut.lanes)
    pack.fill_lanes(element(memory, at.one), memory.dtype.type(1), cut.block // cut.lanes)
    places = bias.firsts.shape[0] - 1
    helped = 0
    while True:
        task, helped = launch.take(counters, worker, helped, places * cut.heads * cut.parts)
        if task < 0:
            break
        number, h_mask, place = task % cut.parts, task // cut.parts % cut.heads, task // cut.parts // cut.heads
        low_row, low_key = number * cut.part_rows, number * cut.part_keys
        for member in range(bias.firsts[place, 0], bias.firsts[place + 1, 0]):
            b = bias.members[member, 0]
            valid = sequences.intervals[b, 1]
            high_row = min(low_row + cut.part_rows, valid) if cut.part_rows else valid
            high_key = low_key + cut.part_keys if cut.part_keys else settings.Lk
            part = Part(number, place, low_row, high_row, low_key, high_key)
            for h in range(h_mask, Hq if cut.heads == 1 else h_mask + 1):
                head = head_of(arrays, sequences, functions, settings, b, h, nothing, NO_NOTES)
                add_head(bias, part, head, gradients, arrays, sequences, settings, sizes, memory, at)


differentiate_bias_through_pointer = through_pointer(differentiate_bias.py_func)


@parallel_kernel
def differentiate_bias_together(code, memory, counters, bias, gradients, arrays, sequences, functions, settings, cut):
    """`differentiate_bias`, whose machine code is at `code`, by as many workers as there are rows of memory."""
    for worker in prange(memory.shape[0]):
        differentiate_bias_through_pointer(
            code, memory[worker], worker, counters, bias, gradients, arrays, sequences, functions, settings, cut
        )


# From Python ----------------------------------------------------------------------------------------------------------


def run(
    call: Call,
    gradients: GradientArrays,
    mask: np.ndarray | None,
    places: np.ndarray,
    slopes: np.ndarray | None,
    kinds: tuple[str, types.Type],
    workers: int,
    operations: float,
) -> None:
    """Add to the gradients of a mask (places, heads, rows, keys) and of slopes (1 or B, Hq), either None if not wanted.

    `places` (B,) says which part of the mask's batch each sequence has used.  Output, lse and delta have been written.
    """
    arrays, settings, dtype = call.arrays, call.settings, call.arrays.lse.dtype
    (Hq, _, D), Dv, B = arrays.q.shape, arrays.out.shape[2], len(places)
    lanes = VECTOR_BYTES // dtype.itemsize
    by_rows = mask is not None and mask.shape[3] == 1
    parts = -(-(settings.Lq if by_rows else settings.Lk) // PART)
    heads = Hq if mask is None else mask.shape[1]
    cut = Cut(KEYS, WIDEST * lanes, lanes, heads, PART if by_rows else 0, 0 if by_rows else PART, parts)
    members = np.argsort(places, kind="stable")
    firsts = np.searchsorted(places[members], np.arange(places.max(initial=-1) + 2))
    sums = np.zeros((0, 0, 0) if slopes is None else (parts, B, Hq))
    written = np.zeros((0, 0, 0, 0), dtype) if mask is None else mask
    bias = Bias(written, sums, members[:, None], firsts[:, None])
    tasks, size = (len(firsts) - 1) * heads * parts, memory_size(D, Dv, cut)
    start = launch.prepared(serial, parallel, kinds, min(workers, tasks), tasks, operations, size, dtype)
    start(bias, gradients, *call, cut)
    if slopes is not None:
        slopes += sums.sum(axis=0) if len(slopes) > 1 or B == 1 else sums.sum(axis=(0, 1))


@functools.lru_cache(maxsize=64)
def memory_size(D: int, Dv: int, cut: Cut) -> int:
    """Elements of a worker's memory: whole cache lines, so that workers do not share one."""
    return -(-memory_map.py_func(Sizes(D, Dv, cut.keys, cut.block, cut.lanes)).size // 16) * 16


def signature(kind: str, operand: types.Type) -> tuple[types.Type, ...]:
    """Of `differentiate_bias`, for a kind of element and an operand, see `narrow`."""
    table = types.Array(types.int64, 2, "C")
    element_type = COMPUTED[kind]
    bias = [types.Array(element_type, 4, "C"), types.Array(types.float64, 3, "C"), table, table]
    return (
        types.Array(element_type, 1, "C"),
        types.int64,
        types.Array(types.int64, 2, "C"),
        types.NamedTuple(bias, Bias),
        gradient_types(kind),
        *call_types(kind, operand, kind),
        types.NamedUniTuple(types.int64, 7, Cut),
    )


serial, parallel = launch.entries(differentiate_bias, differentiate_bias_together, signature)
