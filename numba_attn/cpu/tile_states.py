"""What a mask function leaves of each tile of the scores: a parallel kernel that calls a pass for every tile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numba import prange, types

from numba_attn import threads
from numba_attn.block_mask import EMPTY, FULL, PARTIAL
from numba_attn.cpu import launch
from numba_attn.cpu.jit import Compiled, compiled, kernel, parallel_kernel
from numba_attn.cpu.pointers import address, moved
from numba_attn.cpu.user_functions import MASK, call_pass, integers, make_pass, position

# Elements below which waking up threads costs more than they save.
SERIAL_ELEMENTS = 1 << 16
OPERATIONS = 50  # multiply-adds that take as long as a mask function for one element


def _state_pass(user: Any) -> Callable[..., None]:
    def state_pass(captured, state, rows, keys, b, h, i, j):
        some, every = False, True
        for row in range(rows):
            count = 0
            for key in range(keys):
                if user(captured, b, h, position(i, row), position(j, key)):
                    count += 1
            some, every = some or count > 0, every and count == keys
            if some and not every:
                break
        state[0] = (FULL if every else PARTIAL) if some else EMPTY

    return state_pass


STATE = replace(MASK, template=_state_pass, parameters=lambda element: (types.CPointer(element), *integers(6)))


@call_pass(STATE)
def run_state_pass(codes, index, captured, state, rows, keys, b, h, i, j):
    """Write the state of the tile of `rows` queries from i on and `keys` keys from j on."""


@kernel
def classify(code, captured, states, Lq, Lk, rows, keys, first, end):
    """The states (B, Hq, query tiles, key tiles), of the rows of tiles [first, end) of all heads together."""
    for row in range(first, end):
        head, i = row // states.shape[2], row % states.shape[2] * rows
        for column in range(states.shape[3]):
            j = column * keys
            state = moved(address(states), row * states.shape[3] + column)
            tile_rows, tile_keys = min(rows, Lq - i), min(keys, Lk - j)
            b, h = head // states.shape[1], head % states.shape[1]
            run_state_pass(code, 0, captured, state, tile_rows, tile_keys, b, h, i, j)


@parallel_kernel
def classify_together(code, captured, states, Lq, Lk, rows, keys, first, end):
    """`classify`, by Numba's threads."""
    for row in prange(first, end):
        classify(code, captured, states, Lq, Lk, rows, keys, row, row + 1)


def tile_states(mask_mod: Callable[..., Any], shape: tuple[int, ...], block_size: tuple[int, int]) -> np.ndarray:
    """The `states` of a `BlockMask` of that function, shape and block size."""
    (B, Hq, Lq, Lk), (rows, keys) = shape, block_size
    made = make_pass(STATE, mask_mod, np.uint8)
    states = np.empty((B, Hq, -(-Lq // rows), -(-Lk // keys)), np.uint8)
    lines, elements = B * Hq * states.shape[2], B * Hq * Lq * Lk
    workers = threads.count() if elements > SERIAL_ELEMENTS else 1

    def run(entry: Compiled) -> None:
        for counters in launch.slices(1, lines, elements * OPERATIONS):
            first, end = counters[0, :2].tolist()
            entry.call(made.code, made.captured, states, Lq, Lk, rows, keys, first, min(end, lines))

    if not threads.do_together(workers, lambda: run(_parallel())):
        run(_serial())
    return states


_ARRAYS = (types.Array(types.intp, 1, "C"), types.Array(types.int64, 1, "C"), types.Array(types.uint8, 4, "C"))


@functools.cache
def _serial() -> Compiled:
    return compiled(classify, (*_ARRAYS, *integers(6)))


@functools.cache
def _parallel() -> Compiled:
    return compiled(classify_together, (*_ARRAYS, *integers(6)))
