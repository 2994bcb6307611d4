"""The two products of a tile on tensor cores, from shared memory to registers and on to registers.

Arrays are those of `tile_scores`: four numbers for each pair of 16 rows and 8 columns.
"""

from __future__ import annotations

import math
from typing import Any

from numba_attn.cuda.shared_tiles import chunks_of, make_address, make_stepped, tile_bytes


def make_scores(cuda: Any, ops: Any, kind: str, D: int, tiles: int, key_tiles: int) -> Any:
    """A procedure (s, queries, first_row, keys, first_key, lane): s = Q K^T, of tiles in shared memory."""
    i32, f32 = ops.i32, ops.f32
    address, stepped, down = make_address(cuda, ops, D), make_stepped(cuda, ops, D), tile_bytes(16, D)
    multiply = ops.multiply_bfloat16 if kind == "bfloat16" else ops.multiply_float16
    steps, pairs, scored = chunks_of(D) // 2, key_tiles // 2, 4 * tiles * key_tiles
    left_size = 4 * tiles
    inner_steps = next(n for n in (4, 3, 2, 1) if steps % n == 0)
    outer_steps = steps // inner_steps

    @cuda.jit(device=True, inline="always")
    def scores(s, queries, first_row, keys, first_key, lane):
        left, right = cuda.local.array(left_size, i32), cuda.local.array(4, i32)
        query_place = i32(queries + address(i32(first_row + (lane & 15)), i32(lane >> 4)))
        key_row = i32(first_key + (lane & 7) + ((lane >> 4) << 3))
        key_place = i32(keys + address(key_row, i32((lane >> 3) & 1)))
        for n in range(scored):
            s[n] = f32(0)
        # Two loops instead of one, as long ones are not unrolled.
        for outer in range(outer_steps):
            for inner in range(inner_steps):
                step = outer * inner_steps + inner
                for tile in range(tiles):
                    ops.load_matrices(left, 4 * tile, i32(stepped(query_place, step) + tile * down))
                for pair in range(pairs):
                    ops.load_matrices(right, 0, i32(stepped(key_place, step) + pair * down))
                    for tile in range(tiles):
                        at = 4 * (tile * key_tiles + 2 * pair)
                        multiply(s, at, left, 4 * tile, right[0], right[1])
                        multiply(s, at + 4, left, 4 * tile, right[2], right[3])

    return scores


def make_accumulate(cuda: Any, ops: Any, kind: str, Dv: int, tiles: int, key_tiles: int) -> Any:
    """A procedure (sums, p, values, first_key, lane): sums += P V, with P rounded to 16 bits."""
    i32 = ops.i32
    address, stepped, down = make_address(cuda, ops, Dv), make_stepped(cuda, ops, Dv), tile_bytes(16, Dv)
    multiply = ops.multiply_bfloat16 if kind == "bfloat16" else ops.multiply_float16
    pack = ops.pack_bfloat16 if kind == "bfloat16" else ops.pack_float16
    steps, pairs, value_tiles = key_tiles // 2, chunks_of(Dv) // 2, chunks_of(Dv)
    left_size = 4 * tiles

    @cuda.jit(device=True, inline="always")
    def accumulate(sums, p, values, first_key, lane):
        left, right = cuda.local.array(left_size, i32), cuda.local.array(4, i32)
        value_place = i32(values + address(i32(first_key + (lane & 15)), i32(lane >> 4)))
        for step in range(steps):
            for tile in range(tiles):
                for n in range(4):
                    at = 4 * (tile * key_tiles + 2 * step) + 2 * n
                    left[4 * tile + n] = pack(p[at], p[at + 1])
            for pair in range(pairs):
                ops.load_transposed(right, 0, i32(stepped(value_place, pair) + step * down))
                for tile in range(tiles):
                    at = 4 * (tile * value_tiles + 2 * pair)
                    multiply(sums, at, left, 4 * tile, right[0], right[1])
                    multiply(sums, at + 4, left, 4 * tile, right[2], right[3])

    return accumulate


def make_add_odd(cuda: Any, ops: Any, kind: str, Dv: int, tiles: int, key_tiles: int) -> Any:
    """A procedure (sums, seen, values, first_key, lane): sums += V of what is not finite, for rows that attend to it.

    In a product, 0 times it would be NaN in the rows that do not.
    """
    i32, f32 = ops.i32, ops.f32
    address, value_tiles, warp_keys = make_address(cuda, ops, Dv), chunks_of(Dv), 8 * key_tiles
    halves, infinity = 2 * tiles, math.inf
    lower, upper = (
        (ops.lower_bfloat16, ops.upper_bfloat16) if kind == "bfloat16" else (ops.lower_float16, ops.upper_float16)
    )

    @cuda.jit(device=True, inline="always")
    def add_odd(sums, seen, values, first_key, lane):
        attends = cuda.local.array(halves, i32)
        key = i32(0)
        while key < warp_keys:
            # The lane of the same rows that has this key, and its bit there.
            owner = i32((lane & 28) + ((key & 7) >> 1))
            bit = i32(((key >> 3) << 2) + (key & 1))
            for row in range(halves):
                attends[row] = i32((ops.bits_of_lane(seen[row // 2], owner) >> (bit + 2 * (row % 2))) & 1)
            for n in range(value_tiles):
                word = ops.load_shared_i32(i32(values + address(i32(first_key + key), n) + 4 * (lane & 3)))
                x, y = lower(word), upper(word)
                x = cuda.selp(ops.magnitude(x) < f32(infinity), f32(0), x)
                y = cuda.selp(ops.magnitude(y) < f32(infinity), f32(0), y)
                for row in range(halves):
                    at = 4 * ((row // 2) * value_tiles + n) + 2 * (row % 2)
                    sums[at] = f32(sums[at] + cuda.selp(attends[row] != 0, x, f32(0)))
                    sums[at + 1] = f32(sums[at + 1] + cuda.selp(attends[row] != 0, y, f32(0)))
            key = i32(key + 1)

    return add_odd
