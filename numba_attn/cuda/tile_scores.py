"""What scores are beyond products, which of them count, and which probabilities are dropped.

What these want to know of a row waits in shared memory, so that registers are free for what is in every tile: see
`Row`.

A thread has, of each pair of `tiles` of 16 rows by 8 keys, four scores: rows g and g + 8, where g is its lane // 4, and
of each the keys 2 (lane % 4) and the next one.  Element 4 (tile * key_tiles + key_tile) + 2 half + e of its array is
row 16 tile + 8 half + g, key 8 key_tile + 2 (lane % 4) + e; rows are numbered 2 tile + half in what is kept of each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba_attn import random
from numba_attn.cuda.row_results import LOG2_E


class Row(NamedTuple):
    """Where in shared memory what is known of a row is, in bytes from where the row begins there."""

    low: int = 0  # int32, the first key that it may attend to
    high: int = 4  # int32, the end of them
    mask: int = 8  # int64, the address of its mask
    number: int = 16  # int32
    head: int = 20  # int32
    position: int = 24  # int32, on the keys
    slope: int = 28  # float32


ROW = Row()


def row_bytes(options: bool) -> int:
    """Of a row; without options it has nothing but the keys that it may attend to."""
    return 32 if options else 8


def make_transform(cuda: Any, ops: Any, tiles: int, key_tiles: int, softcap: bool, alibi: bool, step: int) -> Any:
    """A procedure (s, scale, cap, rows, key) that makes scaled, capped and biased scores of products.

    `key` is the number of the thread's first key; what is known of its rows begins at rows + row * step.
    """
    i32, f32 = ops.i32, ops.f32

    @cuda.jit(device=True, inline="always")
    def tanh(x):
        size = ops.magnitude(x)
        small = ops.exp2(ops.product(size, f32(-2 * LOG2_E)))
        far = ops.product(f32(f32(1) - small), ops.reciprocal(f32(f32(1) + small)))
        far = cuda.selp(x < f32(0), f32(-far), far)
        # Near 0, where that difference would cancel, by Taylor's series.
        square = ops.product(x, x)
        series = ops.multiply_add(square, f32(62 / 2835), f32(-17 / 315))
        series = ops.multiply_add(series, square, f32(2 / 15))
        series = ops.multiply_add(series, square, f32(-1 / 3))
        near = ops.multiply_add(ops.product(x, square), series, x)
        return cuda.selp(size < f32(0.3), near, far)

    @cuda.jit(device=True, inline="always")
    def transform(s, scale, cap, rows, key):
        per_cap = ops.reciprocal(cap)
        for row in range(2 * tiles):
            if alibi:
                here = i32(rows + row * step)
                ahead = ops.float_of(i32(ops.load_shared_i32(i32(here + ROW.position)) - key))
                fall = f32(-ops.load_shared_f32(i32(here + ROW.slope)))
            for tile in range(key_tiles):
                for e in range(2):
                    at = 4 * ((row // 2) * key_tiles + tile) + 2 * (row % 2) + e
                    x = ops.product(s[at], scale)
                    if softcap:
                        x = ops.product(tanh(ops.product(x, per_cap)), cap)
                    if alibi:
                        distance = ops.magnitude(f32(ahead - f32(8 * tile + e)))
                        x = ops.multiply_add(fall, distance, x)
                    s[at] = x

    return transform


def make_hide(cuda: Any, ops: Any, tiles: int, key_tiles: int, mask: str, step: int) -> Any:
    """A procedure (s, seen, rows, column, key) that makes scores -inf that do not count, and `seen` tell.

    A row's mask, of elements of the kind `mask`, has one every `column` bytes; `rows`, `step` and `key` are those of
    `make_transform`.  Bit 4 key_tile + 2 half + e of seen[tile] is of that element.
    """
    i32, f32 = ops.i32, ops.f32
    given_too, boolean, hidden = bool(mask), mask == "bool", -math.inf
    load = getattr(ops, f"load_{mask}" if mask else "load_f32")

    @cuda.jit(device=True, inline="always")
    def hide(s, seen, rows, column, key):
        for tile in range(tiles):
            seen[tile] = i32(0)
        for row in range(2 * tiles):
            here = i32(rows + row * step)
            first = i32(ops.load_shared_i32(i32(here + ROW.low)) - key)
            end = i32(ops.load_shared_i32(i32(here + ROW.high)) - key)
            if given_too:
                given_row = ops.behind(ops.load_shared_i64(i32(here + ROW.mask)), key, column)
            for tile in range(key_tiles):
                for e in range(2):
                    at = 4 * ((row // 2) * key_tiles + tile) + 2 * (row % 2) + e
                    n = 8 * tile + e
                    counts = (first <= n) & (n < end)
                    x = s[at]
                    if given_too:
                        given = load(counts, ops.behind(given_row, n, column), f32(0))
                        if boolean:
                            counts = counts & (given != f32(0))
                        else:
                            counts = counts & (given != f32(hidden))
                            x = f32(x + given)
                    s[at] = cuda.selp(counts, x, f32(hidden))
                    bit = 4 * tile + 2 * (row % 2) + e
                    seen[row // 2] = i32(seen[row // 2] | (cuda.selp(counts, i32(1), i32(0)) << bit))

    return hide


def make_drop(cuda: Any, ops: Any, tiles: int, key_tiles: int, step: int) -> Any:
    """A procedure (s, key, rows, sequence, seed_low, seed_high, threshold, lane) that drops probabilities.

    `key` is the number of the first key of the tile, a multiple of 8; `rows` and `step` are those of `make_transform`.
    """
    i32, i64, f32 = ops.i32, ops.i64, ops.f32
    first_factor, second_factor = random.MULTIPLIERS
    first_step, second_step = random.WEYL
    rounds = random.ROUNDS

    @cuda.jit(device=True, inline="always")
    def words(x0, x1, x2, x3, seed_low, seed_high):
        low, high = i32(seed_low), i32(seed_high)
        for _ in range(rounds):
            first_high = ops.product_high(x0, first_factor)
            first_low = ops.product_low(x0, first_factor)
            second_high = ops.product_high(x2, second_factor)
            second_low = ops.product_low(x2, second_factor)
            x0, x1, x2, x3 = i32(second_high ^ x1 ^ low), second_low, i32(first_high ^ x3 ^ high), first_low
            low, high = i32(low + first_step), i32(high + second_step)
        return x0, x1, x2, x3

    @cuda.jit(device=True, inline="always")
    def drop(s, key, rows, sequence, seed_low, seed_high, threshold, lane):
        # Two lanes have two words each of the block of a row's four keys: one finds that of the row of half 0, its
        # neighbour that of half 1, and they exchange what the other needs.
        even = (lane & 1) == 0
        for tile in range(tiles):
            here = i32(rows + cuda.selp(even, i32(2 * tile * step), i32((2 * tile + 1) * step)))
            row = ops.load_shared_i32(i32(here + ROW.number))
            head = ops.load_shared_i32(i32(here + ROW.head))
            for key_tile in range(key_tiles):
                block = i32((key >> 2) + 2 * key_tile + ((lane & 2) >> 1))
                x0, x1, x2, x3 = words(block, row, head, sequence, seed_low, seed_high)
                for e in range(2):
                    lower, upper = (x1, x3) if e else (x0, x2)
                    own = cuda.selp(even, lower, upper)
                    other = ops.exchange_i32(cuda.selp(even, upper, lower), 1)
                    for half in range(2):
                        word = cuda.selp(even, other, own) if half else cuda.selp(even, own, other)
                        at = 4 * (tile * key_tiles + key_tile) + 2 * half + e
                        s[at] = cuda.selp((i64(word) & 0xFFFFFFFF) >= threshold, s[at], f32(0))

    return drop
