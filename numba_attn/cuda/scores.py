"""Scores of a tile, query rows x keys: the part that the kernels of `simt` and `key_weight` have in common.

Each thread of a block has `tile.rows` x `tile.keys` of them in registers; query and key come through shared memory, a
few head elements at a time, with the elements of one column side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numba_attn.block_mask import EMPTY, PARTIAL
from numba_attn.cuda.arguments import REALS, Tile
from numba_attn.cuda.elements import device, make_load, make_load_held

PAD = 4  # elements between rows in shared memory, so that fewer of them are in one bank


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    kind: str  # of query, key, value and output, a name of REALS
    mask: str | None  # the kind of the mask, a name of STORED; None without one
    tile: Tile
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    block_mod: Callable[..., Any] | None = None  # the function of a block mask
    dropout: bool = False
    paged: bool = False
    held: str | None = None  # one of QUANTIZED if keys and values are

    @property
    def real(self) -> type[np.floating]:
        return REALS[self.kind]


class Scores(NamedTuple):
    """Device functions; all threads of a block call `multiply` together."""

    allowed: Any
    multiply: Any
    finish: Any
    key_at: Any
    load_held: Any


def make_scores(cuda: Any, variant: Variant) -> Scores:
    """The device functions of a variant."""
    tile, real = variant.tile, variant.real
    rows, keys, across, depth = tile.rows, tile.keys, tile.threads_across, tile.depth
    block_rows, block_keys, threads = tile.block_rows, tile.block_keys, tile.threads
    load = make_load(cuda, variant.kind, real)
    load_held = make_load_held(cuda, variant.held or variant.kind, real)
    load_bias = make_load(cuda, variant.mask or variant.kind, real)
    boolean, additive = variant.mask == "bool", variant.mask not in (None, "bool")
    masked, blocks, paged = variant.mask_mod is not None, variant.block_mod is not None, variant.paged
    score_mod = device(cuda)(variant.score_mod or _same_score)
    mask_mod, block_mod = (device(cuda)(f or _always) for f in (variant.mask_mod, variant.block_mod))
    zero, lowest = real(0), real(-math.inf)

    @device(cuda)
    def position_allowed(i, j, b, h, mask, mask_at, states, states_at, n, words, floats, thread):
        """Whether the mask, the block mask and the mask function let row i attend to key j."""
        yes = True
        if boolean:
            yes = mask[mask_at + i * n.mask_row + j * n.mask_key] != 0
        if additive:
            yes = load_bias(mask, mask_at + i * n.mask_row + j * n.mask_key, words, floats, thread) != lowest
        if blocks and yes:
            state = states[states_at + i // n.tile_rows * n.states_row + j // n.tile_keys]
            if state == PARTIAL:
                yes = bool(block_mod(b, h, i, j))
            else:
                yes = state != EMPTY
        if masked and yes:
            yes = bool(mask_mod(b, h, i, j))
        return yes

    @device(cuda)
    def allowed(
        first_row, end_row, first_key, end_key, offset, b, h, mask, mask_at, states, states_at, n, words, floats, thread
    ):
        """Which scores of a thread are attended to, as bits: row by row of those from `first_row`, `first_key` on."""
        bits = np.int64(0)
        for r in range(rows):
            i = first_row + r
            low, high = i + offset - n.left, min(end_key, i + offset + n.right + 1)
            for c in range(keys):
                j = first_key + c
                if (
                    i < end_row
                    and low <= j
                    and j < high
                    and position_allowed(i, j, b, h, mask, mask_at, states, states_at, n, words, floats, thread)
                ):
                    bits |= np.int64(1) << (r * keys + c)
        return bits

    @device(cuda)
    def key_at(j, b, start, row_stride, page_stride, pages, n):
        """Where in the keys, or in the values, row j of a sequence starts."""
        if paged:
            page = pages[b * n.page_count + j // n.page_rows]
            at = start + page * page_stride + j % n.page_rows * row_stride
        else:
            at = start + j * row_stride
        return at

    @device(cuda)
    def multiply(
        s, q, k, q_at, k_at, i0, end_row, j0, end_key, b, pages, n, query_stage, key_stage, words, floats, thread
    ):
        """s = Q K^T of the tile that starts at row i0 and key j0, the part of the thread."""
        down, along = thread // across * rows, thread % across * keys
        for r in range(rows):
            for c in range(keys):
                s[r, c] = zero
        for d0 in range(0, n.D, depth):
            if d0 != 0:
                cuda.syncthreads()  # before what is there is overwritten; the caller has done so for the first
            for element in range(thread, block_rows * depth, threads):
                row, d = element // depth, element % depth
                i, x = i0 + row, zero
                if i < end_row and d0 + d < n.D:
                    x = load(q, q_at + i * n.query_row + (d0 + d) * n.query_column, words, floats, thread)
                query_stage[d, row] = x
            for element in range(thread, block_keys * depth, threads):
                row, d = element // depth, element % depth
                j, x = j0 + row, zero
                if j < end_key and d0 + d < n.D:
                    at = key_at(j, b, k_at, n.key_row, n.key_page, pages, n)
                    x = load_held(k, at, d0 + d, n.key_column, n.D, words, floats, thread)
                key_stage[d, row] = x
            cuda.syncthreads()
            for d in range(depth):
                of_query, of_key = cuda.local.array(rows, real), cuda.local.array(keys, real)
                for r in range(rows):
                    of_query[r] = query_stage[d, down + r]
                for c in range(keys):
                    of_key[c] = key_stage[d, along + c]
                for r in range(rows):
                    for c in range(keys):
                        s[r, c] += of_query[r] * of_key[c]

    @device(cuda)
    def finish(s, i, j, b, h, offset, scale, softcap, slope, mask, mask_at, n, words, floats, thread):
        """The score of row i and key j, from the product of the two."""
        s = s * scale
        if softcap > zero:
            s = softcap * real(math.tanh(s / softcap))
        if n.has_slopes != 0:
            s = s - slope * real(abs(i + offset - j))
        if additive:
            s = s + load_bias(mask, mask_at + i * n.mask_row + j * n.mask_key, words, floats, thread)
        return real(score_mod(s, b, h, i, j))

    return Scores(allowed, multiply, finish, key_at, load_held)


def _same_score(score, b, h, i, j):
    return score


def _always(b, h, i, j):
    return True
