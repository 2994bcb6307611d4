"""Attention as other compiled code calls it: one serial entry, which does what `attention` and `Problem` do in Python.

It takes the kernels by their addresses, so that what calls it holds no copy of them.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import types

from numba_attn.cpu import decode, forward, plan, splits
from numba_attn.cpu.blocks import LOG2_E
from numba_attn.cpu.jit import Compiled, compiled, counting_kernel, device, through_pointer
from numba_attn.cpu.narrow import COMPUTED, STORED
from numba_attn.cpu.plan import LEAST_KEYS
from numba_attn.cpu.score import Arrays, Functions, Sequences, Settings
from numba_attn.cpu.target import VECTOR_BYTES

tile_keys, short_keys = device(plan.tile_keys), device(plan.short_keys)
split_keys, splits_of, most_rows = forward.split_keys, forward.splits_of, device(decode.most_rows)


@counting_kernel
def attend(codes, q, k, v, out, offset, query_length, kv_length, left, right, scale, softcap):
    """Write attention of arrays (B, H, L, D) to out, which must fit; codes are the addresses of forward and decode.

    The scale is NaN for 1 / sqrt(D), softcap 0 for none; offset, lengths and window are the same for all sequences.
    """
    (B, Hq, Lq, D), (_, Hkv, Lk, _), Dv = q.shape, k.shape, v.shape[3]
    if B * Hq * Lq == 0:
        return
    number, itemsize = out.dtype.type, out.itemsize
    lanes = VECTOR_BYTES // itemsize
    if math.isnan(scale):
        scale = 1 / math.sqrt(D) if D else 1.0
    offsets, intervals, numbers = np.zeros((B, 10), np.int64), np.empty((B, 3), np.int64), np.empty((B, 1), np.int64)
    for b in range(B):
        offsets[b, 0], offsets[b, 1], offsets[b, 2] = b * q.strides[0], b * k.strides[0], b * v.strides[0]
        offsets[b, 4] = b * out.strides[0]
        intervals[b, 0], intervals[b, 1], intervals[b, 2], numbers[b, 0] = offset, query_length, kv_length, b
    none = np.empty((0, 0), out.dtype)
    arrays = Arrays(
        q[0], k[0], v[0], np.empty((0, 0, 0), np.uint8), out[0], none, none, none, np.empty((0, 0, 0), out.dtype), none,
        none.reshape(-1), np.empty((0, 0, 0, 0), np.uint8), none.reshape(-1),
    )  # fmt: skip
    sequences = Sequences(offsets, intervals, numbers, np.zeros((1, 1), np.int64))
    table = np.zeros(1, np.int64)
    functions = Functions(np.zeros(4, np.intp), table, table, table, table)
    settings = Settings(
        left, right, number(scale), number(scale * LOG2_E), number(softcap), number(1.0),
        0, 0, 0, 0, 0, 0, 0, 0, 0, Lq, Lk,
    )  # fmt: skip
    counters = np.zeros((1, 8), np.int64)
    if min(Lq, query_length) <= most_rows(lanes, Hq // Hkv):
        group, rows = Hq // Hkv, max(1, min(Lq, query_length))
        end, first = min(kv_length, offset + rows + right), max(0, offset - left)
        count = splits.splits_between(first, end, splits.split_size(kv_length - first, Hkv))
        cut_rows = splits.cut_by_rows(rows, group, group, count, lanes)
        height, columns = splits.power_of_two(cut_rows.heads * rows), splits.padded(Dv, lanes)
        size = splits.memory_map(splits.padded(D, lanes), columns, lanes, cut_rows.blocks, height).size
        state = splits.whole_lines(splits.state_size(cut_rows.blocks, height, columns, lanes))
        partials = np.empty((B * Hkv * count, state), out.dtype)
        counters[0, 1] = B * Hkv * count
        decode.decode_through_pointer(
            codes[1:], 0, np.empty((1, splits.whole_lines(size)), out.dtype), counters,
            np.empty((1, 2, splits.TABLE), np.int64), partials, np.zeros((B * Hkv, 1), np.int64),
            none, arrays, sequences, functions, settings, cut_rows,
        )  # fmt: skip
        return
    block = plan.WIDEST * lanes
    keys = tile_keys(block, D, Dv, itemsize)
    count = splits_of(kv_length, split_keys(Hkv, query_length, kv_length, block, keys, LEAST_KEYS))
    cut = forward.Cut(keys, short_keys(Dv, itemsize), block, 1, 1, lanes, 0, 1, 0, LEAST_KEYS, count, 0)
    sizes = forward.Sizes(D, Dv, max(cut.keys, cut.short), cut.block, cut.lanes, 0)
    at = forward.memory_map(sizes)
    counters[0, 1] = B * Hq * ((Lq + block - 1) // block)
    partials = np.empty((count if count > 1 else 0, forward.kept_size(at, sizes)), out.dtype)
    forward.work_through_pointer(
        codes, 0, np.empty((1, splits.whole_lines(at.state + at.state_size)), out.dtype), counters,
        partials, np.zeros((0, 1), np.int64), arrays, sequences, functions, settings, cut,
    )  # fmt: skip


attend_through_pointer = through_pointer(attend.py_func)


@functools.cache
def entry(kind: str) -> tuple[Compiled, np.ndarray]:
    """`attend`, compiled for a kind of element, and the addresses that it takes."""
    kinds = kind, COMPUTED[kind], kind
    codes = [module.entry(*kinds).code for module in (forward, decode)]
    given = types.Array(STORED[kind], 4, "A", readonly=True, aligned=False)
    written = types.Array(STORED[kind], 4, "A", aligned=False)
    signature = (
        types.Array(types.intp, 1, "C"), given, given, given, written, *(types.int64,) * 5, *(types.float64,) * 2,
    )  # fmt: skip
    return compiled(attend, signature), np.concatenate(codes)
