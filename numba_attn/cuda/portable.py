"""The portable kernels on a problem: which variant, the tables and the numbers that it takes, and its launches."""

from __future__ import annotations

from typing import Any

import numpy as np

from numba_attn import checks, random
from numba_attn.cuda.arguments import COLUMNS, KEY, KEY_WEIGHT, MASK, OFFSET, STORED, VALUE, Numbers, Reals, Tile
from numba_attn.cuda.key_weight import make_key_weight
from numba_attn.cuda.placed import ARRAYS, Placed, kind_of
from numba_attn.cuda.scores import Variant
from numba_attn.cuda.simt import make_forward
from numba_attn.problem import Problem, Sizes

FEW_ROWS = 16


def tile_of(kind: str, Lq: int, Dv: int) -> Tile:
    """How the portable kernels cut a problem up.

    The order in which a row's numbers are summed, and so each bit of them, follows from the keys of a block alone.
    """
    side = 2 if kind == "float64" else 4
    columns = next((n for n in (1, 2, 4) if Dv <= n * 16), 2 * side)
    return Tile(1 if Lq <= FEW_ROWS else side, side, columns, 16, 16, 16)


def run(problem: Problem, machine: Any, places: dict[str, Placed]) -> None:
    """Compute a problem whose arrays, and their places on the machine, are known by the names of `placed.ARRAYS`."""
    B, Hq, _, Lq, Lk, _, _ = sizes = problem.sizes
    variant = variant_of(problem, sizes, machine)
    tile, real = variant.tile, variant.real
    arrays = [places.get(name) for name in ARRAYS]
    norms = machine.empty(2 * B * Hq * Lq, real) if "key_weight" in places and Lq else None
    buffers = _buffers(problem, variant, machine, arrays, norms)
    n = _numbers(problem, sizes, tile, arrays)
    x = Reals(problem.scale, problem.softcap or 0.0, 1.0 if problem.dropout is None else 1 / (1 - problem.dropout.p))
    if Lq:
        blocks = B * Hq * n.row_blocks * n.column_blocks
        machine.launch(make_forward, tuple(variant), tile.threads, blocks, buffers, n, x)
    if "key_weight" in places and Lk:
        # Neither dropout nor the values have a part in it.
        variant = variant._replace(dropout=False, tile=tile._replace(columns=1))
        machine.launch(make_key_weight, tuple(variant), tile.threads, B * Hq * n.key_blocks, buffers, n, x)


def variant_of(problem: Problem, sizes: Sizes, machine: Any) -> Variant:
    """What kernels are to be compiled for."""
    kind = kind_of(problem.query.dtype)
    mask = None if problem.mask is None else kind_of(problem.mask.dtype)
    block = None if problem.block_mask is None else checks.plain_function(problem.block_mask.mask_mod)
    functions = {"score_mod": problem.score_mod, "mask_mod": problem.mask_mod, "block_mask": block}
    mods = [None if f is None else machine.function(name, f) for name, f in functions.items()]
    held = problem.storage
    return Variant(
        kind, mask, tile_of(kind, sizes.Lq, sizes.Dv), mods[0], mods[1], mods[2], problem.dropout is not None,
        held is not None and held.pages is not None, None if held is None else held.numbers,
    )  # fmt: skip


def _buffers(problem: Problem, variant: Variant, machine: Any, arrays: list[Any], norms: Any) -> list[Any]:
    """The arrays that kernels take, in their order; one element in the place of what there is not.

    Norms are (B, Hq, Lq, 2), flat: of each row the largest score and the logarithm of its sum.
    """
    real = variant.real
    stored: list[Any] = [STORED[variant.kind]] * 5 + [real] * 4
    stored[MASK] = STORED[variant.mask or variant.kind]
    buffers = [
        machine.constant(_nothing(dtype)) if x is None else x.buffer for x, dtype in zip(arrays, stored, strict=True)
    ]
    buffers.append(machine.constant(_nothing(real)) if norms is None else norms)
    held, block = problem.storage, problem.block_mask
    tables: list[tuple[Any, type[np.generic]]] = [
        (problem.slopes, real),
        (problem.sinks, real),
        (None if block is None else block.states, np.uint8),
        (None if held is None else held.pages, np.int64),
        (_table(problem, arrays), np.int64),
    ]
    for table, dtype in tables:
        flat = _nothing(dtype) if table is None or not table.size else table.astype(dtype, order="C").reshape(-1)
        buffers.append(machine.constant(flat))
    return buffers


def _nothing(dtype: Any) -> np.ndarray:
    return np.zeros(1, dtype)


def _table(problem: Problem, arrays: list[Placed | None]) -> np.ndarray:
    """Of sequences, see `arguments`: where they start in the arrays, and where their rows stand on their keys."""
    table = np.zeros((len(problem.intervals.table), COLUMNS), np.int64)
    table[:, OFFSET:] = problem.intervals.table
    batch = (len(table),) if problem.packed is not None else problem.query.shape[:-3]
    in_pages = problem.storage is not None and problem.storage.pages is not None
    for column, x in enumerate(arrays):
        if x is None:
            continue
        if in_pages and column in (KEY, VALUE):
            table[:, column] = x.first
        elif problem.packed is not None and column != MASK:
            starts = problem.packed.key_starts if column in (KEY, VALUE, KEY_WEIGHT) else problem.packed.query_starts
            table[:, column] = x.first + starts[:-1] * x.strides[1]
        else:
            table[:, column] = x.starts(batch)
    return table


def _numbers(problem: Problem, sizes: Sizes, tile: Tile, arrays: list[Placed | None]) -> Numbers:
    """The integers of a call."""
    _, Hq, Hkv, Lq, Lk, D, Dv = sizes
    query, key, value, mask, out, *statistics = ((0, 0, 0) if x is None else x.strides for x in arrays)
    lse, max_score, entropy, key_weight = (x[-2:] for x in statistics)
    wants = (x is not None for x in arrays[5:9])  # norms for key_weight
    pages, block = None if problem.storage is None else problem.storage.pages, problem.block_mask
    page_rows, page_count, key_page, value_page = 0, 0, 0, 0
    if problem.storage is not None and pages is not None:
        page_rows, page_count, key_page, value_page = problem.storage.key.shape[2], pages.shape[1], key[0], value[0]
    states_sequence, states_head, states_row, tile_rows, tile_keys = 0, 0, 0, 1, 1
    if block is not None:
        sequences, heads, rows, states_row = block.states.shape
        states_head = 0 if heads == 1 else rows * states_row
        states_sequence = 0 if sequences == 1 else heads * rows * states_row
        tile_rows, tile_keys = block.block_size
    p, seed = problem.dropout or (0.0, 0)
    numbers = (
        *(-(-Lq // tile.block_rows), -(-Lk // tile.block_keys), max(1, -(-Dv // tile.block_columns))),
        *(Hq, Hq // Hkv, D, Dv, Lq, Lk),
        problem.packed is not None,
        *(problem.intervals.left, problem.intervals.right),
        *(*query[-3:], *key[-3:], *value[-3:], *mask[-3:], *out[-3:]),
        *(*lse, *max_score, *entropy, *key_weight),
        *wants,
        problem.slopes is not None,
        Hq if problem.slopes is not None and len(problem.slopes) > 1 else 0,
        problem.sinks is not None,
        *(states_sequence, states_head, states_row, tile_rows, tile_keys),
        *(page_rows, page_count, key_page, value_page),
        seed - (seed >> 63 << 64),
        random.threshold(p),
    )
    return Numbers._make(map(int, numbers))
