"""What a block of the kernel `flash` writes when it has seen its keys: results, or parts of them."""

from __future__ import annotations

import math
from typing import Any

from numba_attn.cuda.row_results import LOG2_E, make_finish
from numba_attn.cuda.shared_tiles import chunks_of, make_address

STATISTICS_BYTES = 16  # of a row of a part: its largest score, its sum of weights, and that of p log2(p)


def part_columns(Dv: int) -> int:
    """Sums of a row of a part: those of the tiles that products make."""
    return 8 * chunks_of(Dv)


def part_row(Dv: int) -> int:
    """Bytes of a row of a warp's part in shared memory, statistics last, so that rows begin in different banks."""
    return 4 * (part_columns(Dv) + 8)


def make_write_results(cuda: Any, ops: Any, kind: str, Dv: int, tiles: int, general: bool) -> Any:
    """A procedure that writes the results of all rows, by way of shared memory, so that stores are wide."""
    i16, i32, i64, f32 = ops.i16, ops.i32, ops.i64, ops.f32
    finish, address = make_finish(cuda, ops, general), make_address(cuda, ops, Dv)
    pack = ops.pack_bfloat16 if kind == "bfloat16" else ops.pack_float16
    value_tiles, chunks, halves, nothing = chunks_of(Dv), -(-Dv // 8), 2 * tiles, -math.inf
    every_chunk = 16 * tiles * chunks
    steps = -(-every_chunk // 32)

    @cuda.jit(device=True, inline="always")
    def write_results(
        sums, top, total, spread, shared, warp_row, first_row, valid, every, lane,
        out, out_head, out_row, out_column, wide, lse, max_score, entropy,
        statistic, statistic_head, statistic_row, sinks, head, group, scale, coarse, gain,
    ):  # fmt: skip
        for row in range(halves):
            inside = i32(warp_row + 8 * row + (lane >> 2))
            packed = i32(first_row + inside)
            i = ops.quotient(packed, group)
            h = i32(head * group + packed - i * group)
            exists, attends = packed < every, packed < valid
            sink = ops.load_f32(exists & (sinks != 0), i64(sinks + 4 * h), f32(nothing))
            best = cuda.selp(attends, top[row], f32(nothing))
            weight = cuda.selp(attends, total[row], f32(0))
            moment = cuda.selp(attends, spread[row], f32(0))
            factor, row_lse, largest, row_entropy = finish(best, weight, moment, sink, scale, coarse)
            once = exists & ((lane & 3) == 0)
            at = i64(statistic + i64(h) * statistic_head + i64(i) * statistic_row)
            ops.store_f32(once & (lse != 0), i64(lse + at), row_lse)
            ops.store_f32(once & (max_score != 0), i64(max_score + at), largest)
            ops.store_f32(once & (entropy != 0), i64(entropy + at), row_entropy)
            factor = ops.product(factor, gain)
            for n in range(value_tiles):
                first = 4 * ((row // 2) * value_tiles + n) + 2 * (row % 2)
                x = cuda.selp(attends, ops.product(sums[first], factor), f32(0))
                y = cuda.selp(attends, ops.product(sums[first + 1], factor), f32(0))
                ops.store_shared_i32(True, i32(shared + address(inside, n) + 4 * (lane & 3)), pack(x, y))
        ops.sync_warp()
        words = cuda.local.array(4, i32)
        for step in range(steps):
            n = i32(lane + 32 * step)
            within = n < every_chunk
            inside = ops.quotient(n, chunks)
            chunk = i32(n - inside * chunks)
            inside = i32(inside + warp_row)
            packed = i32(first_row + inside)
            i = ops.quotient(packed, group)
            h = i32(head * group + packed - i * group)
            exists = within & (packed < every)
            ops.load_shared_16(words, 0, within, i32(shared + address(inside, chunk)))
            at = i64(out + i64(h) * out_head + i64(i) * out_row + i64(chunk << 3) * out_column)
            if wide != 0:
                ops.store_16(exists, at, words[0], words[1], words[2], words[3])
            else:
                for e in range(8):
                    there = exists & (i32((chunk << 3) + e) < Dv)
                    ops.store_i16(there, i64(at + e * out_column), i16(words[e // 2] >> (16 * (e % 2))))

    return write_results


def make_write_parts(cuda: Any, ops: Any, Dv: int, tiles: int) -> Any:
    """A procedure that writes the part of every row; one of no keys has statistics alone."""
    i32, i64 = ops.i32, ops.i64
    columns, value_tiles, halves = part_columns(Dv), chunks_of(Dv), 2 * tiles

    @cuda.jit(device=True, inline="always")
    def write_parts(sums, top, total, spread, parts, part_sums, place, warp_row, valid, begun, lane):
        for row in range(halves):
            inside = i32(warp_row + 8 * row + (lane >> 2))
            exists = inside < valid
            once = exists & ((lane & 3) == 0)
            at = i64(parts + (place + inside) * STATISTICS_BYTES)
            ops.store_f32(once, at, top[row])
            ops.store_f32(once, i64(at + 4), total[row])
            ops.store_f32(once, i64(at + 8), spread[row])
            if begun:
                at = i64(part_sums + 4 * ((place + inside) * columns + 2 * (lane & 3)))
                for n in range(value_tiles):
                    first = 4 * ((row // 2) * value_tiles + n) + 2 * (row % 2)
                    ops.store_f32x2(exists, i64(at + 32 * n), sums[first], sums[first + 1])

    return write_parts


def make_join_warps(cuda: Any, ops: Any, Dv: int, tiles: int, row_warps: int, key_warps: int, general: bool) -> Any:
    """A procedure that writes parts of rows of which several warps have had some of the keys."""
    i32, i64, f32 = ops.i32, ops.i64, ops.f32
    columns, row_bytes, value_tiles, halves = part_columns(Dv), part_row(Dv), chunks_of(Dv), 2 * tiles
    rows, threads = 16 * tiles * row_warps, 32 * row_warps * key_warps
    every = rows * columns
    steps, row_steps, nothing = -(-every // threads), -(-rows // threads), -math.inf
    base = LOG2_E if general else 1.0

    @cuda.jit(device=True, inline="always")
    def top_of(place):
        """The largest score of the row whose first part is there."""
        high = f32(nothing)
        for warp in range(key_warps):
            high = ops.maximum(high, ops.load_shared_f32(i32(place + warp * (rows * row_bytes) + 4 * columns)))
        return high

    @cuda.jit(device=True, inline="always")
    def fall_of(place, warp, high):
        """How far the largest score of a warp's part of a row is below that of the row, in base 2."""
        level = cuda.selp(high == f32(nothing), f32(0), high)
        own = ops.load_shared_f32(i32(place + warp * (rows * row_bytes) + 4 * columns))
        return ops.product(f32(own - level), f32(base))

    @cuda.jit(device=True, inline="always")
    def join_warps(
        sums, top, total, spread, shared, warp_row, key_warp, parts, part_sums, place, valid, begun, thread
    ):  # fmt: skip
        lane = i32(thread & 31)
        for row in range(halves):
            at = i32(shared + (key_warp * rows + warp_row + 8 * row + (lane >> 2)) * row_bytes)
            for n in range(value_tiles):
                first = 4 * ((row // 2) * value_tiles + n) + 2 * (row % 2)
                ops.store_shared_f32x2(i32(at + 32 * n + 8 * (lane & 3)), sums[first], sums[first + 1])
            ops.store_shared_f32(i32(at + 4 * columns), top[row])
            ops.store_shared_f32(i32(at + 4 * columns + 4), total[row])
            ops.store_shared_f32(i32(at + 4 * columns + 8), spread[row])
        cuda.syncthreads()
        for step in range(row_steps):
            inside = i32(thread + step * threads)
            exists = (inside < rows) & (inside < valid)
            at = i32(shared + cuda.selp(inside < rows, inside, i32(0)) * row_bytes)
            high, weight, moment = top_of(at), f32(0), f32(0)
            for warp in range(key_warps):
                fall = fall_of(at, warp, high)
                shrink = ops.exp2(fall)
                fall = cuda.selp(shrink == f32(0), f32(0), fall)
                own = i32(at + warp * (rows * row_bytes) + 4 * columns)
                own_weight = ops.load_shared_f32(i32(own + 4))
                own_moment = ops.multiply_add(own_weight, fall, ops.load_shared_f32(i32(own + 8)))
                weight = ops.multiply_add(shrink, own_weight, weight)
                moment = ops.multiply_add(shrink, own_moment, moment)
            at_part = i64(parts + (place + inside) * STATISTICS_BYTES)
            ops.store_f32(exists, at_part, high)
            ops.store_f32(exists, i64(at_part + 4), weight)
            ops.store_f32(exists, i64(at_part + 8), moment)
        if begun:
            for step in range(steps):
                n = i32(thread + step * threads)
                n = cuda.selp(n < every, n, i32(0))
                inside = ops.quotient(n, columns)
                column = i32(n - inside * columns)
                at = i32(shared + inside * row_bytes)
                high, x = top_of(at), f32(0)
                for warp in range(key_warps):
                    own = ops.load_shared_f32(i32(at + warp * (rows * row_bytes) + 4 * column))
                    x = ops.multiply_add(ops.exp2(fall_of(at, warp, high)), own, x)
                at_sum = i64(part_sums + 4 * ((place + inside) * columns + column))
                ops.store_f32(inside < valid, at_sum, x)

    return join_warps
