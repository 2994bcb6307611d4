"""What a mask function leaves of each tile of the scores: a kernel that calls a pass for every tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numba import types

from numba_attn import threads
from numba_attn.block_mask import EMPTY, FULL, PARTIAL
from numba_attn.cpu import launch
from numba_attn.cpu.jit import device, kernel
from numba_attn.cpu.pointers import address, moved
from numba_attn.cpu.user_functions import MASK, call_pass, integers, make_pass, position
from numba_attn.cpu.workers import by_workers

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


@device
def do_tasks(worker, memories, counters, code, captured, states, Lq, Lk, rows, keys):
    """Do tasks until there are none: a row of tiles each, of the states (B, Hq, query tiles, key tiles)."""
    _, Hq, of_head, columns = states.shape
    helped = 0
    while True:
        row, helped = launch.take(counters, worker, helped, states.shape[0] * Hq * of_head)
        if row < 0:
            break
        head, i = row // of_head, row % of_head * rows
        for column in range(columns):
            j = column * keys
            state = moved(address(states), row * columns + column)
            tile_rows, tile_keys = min(rows, Lq - i), min(keys, Lk - j)
            run_state_pass(code, 0, captured, state, tile_rows, tile_keys, head // Hq, head % Hq, i, j)


do_all_tasks = by_workers(do_tasks)


@kernel
def classify(launcher, memories, counters, code, captured, states, Lq, Lk, rows, keys):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, code, captured, states, Lq, Lk, rows, keys)


# From Python ----------------------------------------------------------------------------------------------------------


def tile_states(mask_mod: Callable[..., Any], shape: tuple[int, ...], block_size: tuple[int, int]) -> np.ndarray:
    """The `states` of a `BlockMask` of that function, shape and block size."""
    (B, Hq, Lq, Lk), (rows, keys) = shape, block_size
    made = make_pass(STATE, mask_mod, np.uint8)
    states = np.empty((B, Hq, -(-Lq // rows), -(-Lk // keys)), np.uint8)
    tasks, elements = B * Hq * states.shape[2], B * Hq * Lq * Lk
    workers = min(threads.count(), tasks) if elements > SERIAL_ELEMENTS else 1
    start = launch.prepared(entry, (), workers, tasks, elements * OPERATIONS, 0, states.dtype)
    start(made.code, made.captured, states, Lq, Lk, rows, keys)
    return states


def signature() -> tuple[types.Type, ...]:
    """Of `classify`."""
    return launch.signature_of(
        types.uint8,
        types.Array(types.intp, 1, "C"),
        types.Array(types.int64, 1, "C"),
        types.Array(types.uint8, 4, "C"),
        *integers(4),
    )


entry = launch.entry(classify, signature)
