"""Attention of 16-bit numbers on tensor cores, softmax(scale Q K^T) V without the matrix of scores: the kernel.

A block of threads has one tile of rows, packed from the query rows of all heads that share keys: row r is query row
r // group of head r % group.  It goes over the tiles of keys that these may attend to and keeps, for each row, the
largest score, the sum of exponentials below it and the output so far.  Scores stay in registers, where the fragments of
one product are, as numbers of 16 bits, the operands of the next.  Keys are copied a tile ahead of what is computed.

Where few rows have many keys, blocks have `chunk` keys each and write what `combine` joins; tiles and chunks begin at
multiples of their size, so that no sum depends on what else is in a batch.

Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning" (2023); Dao, Haziza, Massa and
Sizov, "Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba_attn.cuda.flash_results import make_join_warps, make_write_parts, make_write_results, part_row
from numba_attn.cuda.products import make_accumulate, make_add_odd, make_scores
from numba_attn.cuda.row_results import LOG2_E, make_unit
from numba_attn.cuda.sequences import make_sequence
from numba_attn.cuda.shared_tiles import make_copy, make_copy_packed, make_not_finite, tile_bytes
from numba_attn.cuda.tile_scores import ROW, make_drop, make_hide, make_transform, row_bytes


class Block(NamedTuple):
    """Where in shared memory what is known of a block is, in bytes from where that begins."""

    low: int = 0  # int32, the first key that every row may attend to
    high: int = 4  # int32, the end of them
    stop: int = 8  # int32, the end of its tiles
    length: int = 12  # int32, keys of the sequence
    keys: int = 16  # int64, the address of the first
    values: int = 24  # int64, likewise


BLOCK, BLOCK_BYTES = Block(), 32


class Configuration(NamedTuple):
    """What a kernel is compiled for."""

    kind: str  # "bfloat16" or "float16"
    D: int
    Dv: int
    tiles: int  # of 16 rows that a warp has
    row_warps: int  # that share the rows of a block
    key_warps: int  # that share the keys of a tile
    keys: int  # of a tile
    stages: int  # tiles of keys, and of values, in shared memory
    split: bool  # write parts, for `combine`, instead of results
    mask: str  # kind of its elements, "" if there is none
    general: bool  # scores are more than a positive number times the products
    softcap: bool
    alibi: bool
    dropout: bool
    entropy: bool

    @property
    def rows(self) -> int:
        return 16 * self.tiles * self.row_warps

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.key_warps

    @property
    def row_bytes(self) -> int:
        """Of what is known of a row, in shared memory."""
        return row_bytes(bool(self.mask) or self.alibi or self.dropout)

    @property
    def shared_bytes(self) -> int:
        keys, values = tile_bytes(self.keys, self.D), tile_bytes(self.keys, self.Dv)
        loop = tile_bytes(self.rows, self.D) + self.stages * (keys + values) + BLOCK_BYTES
        loop += self.key_warps * self.rows * self.row_bytes
        after = 0 if self.split else tile_bytes(self.rows, self.Dv)
        if self.key_warps > 1:
            after = self.key_warps * self.rows * part_row(self.Dv)
        return max(loop, after)


def make_softmax(
    cuda: Any, ops: Any, tiles: int, key_tiles: int, value_tiles: int, general: bool, entropy: bool
) -> Any:
    """A procedure (s, sums, top, total, spread, unit, coarse, limit): scores to exponentials.

    They are below `top`, the largest score of each row so far, as a product; what has been summed is brought to that
    too.  `spread` is the sum of p log2(p), of p before division by `total`.
    """
    f32, halves, nothing, unit_of = ops.f32, 2 * tiles, -math.inf, make_unit(cuda, ops)

    @cuda.jit(device=True, inline="always")
    def softmax(s, sums, top, total, spread, unit, coarse, limit):
        for row in range(halves):
            first = 4 * (row // 2) * key_tiles + 2 * (row % 2)
            high = ops.maximum(s[first], s[first + 1])
            for n in range(1, key_tiles):
                high = ops.maximum(high, ops.maximum(s[first + 4 * n], s[first + 4 * n + 1]))
            high = ops.maximum(high, ops.exchange_f32(high, 1))
            high = ops.maximum(high, ops.exchange_f32(high, 2))
            high = ops.maximum(high, top[row])
            level = cuda.selp(high == f32(nothing), f32(0), high)
            if general:
                fall = ops.product(f32(top[row] - level), f32(LOG2_E))
            else:
                by = unit_of(level, unit, coarse, limit)
                # Negative once for all, as a sign that each use would turn takes a register more.
                shift = ops.product(f32(-level), by)
                fall = f32(ops.product(top[row], by) + shift)
            shrink = ops.exp2(fall)
            if entropy:
                fall = cuda.selp(shrink == f32(0), f32(0), fall)
                spread[row] = ops.product(shrink, ops.multiply_add(total[row], fall, spread[row]))
            top[row] = high
            added = f32(0)
            for n in range(key_tiles):
                for e in range(2):
                    at = first + 4 * n + e
                    if general:
                        x = ops.product(f32(s[at] - level), f32(LOG2_E))
                    else:
                        x = ops.multiply_add(s[at], by, shift)
                    p = ops.exp2(x)
                    if entropy:
                        spread[row] = ops.multiply_add(p, ops.larger(x, f32(-1024)), spread[row])
                    added = f32(added + p)
                    s[at] = p
            total[row] = ops.multiply_add(total[row], shrink, added)
            for n in range(value_tiles):
                for e in range(2):
                    at = 4 * ((row // 2) * value_tiles + n) + 2 * (row % 2) + e
                    sums[at] = ops.product(sums[at], shrink)

    return softmax


def make_flash(cuda: Any, ops: Any, *configuration: Any) -> Any:
    """The kernel of a `Configuration`, with the parameters `sequences.PARAMETERS`."""
    c = Configuration(*configuration)
    i32, i64, f32 = ops.i32, ops.i64, ops.f32
    rows, threads, keys, stages = c.rows, c.threads, c.keys, c.stages
    row_warps, key_warps, tiles = c.row_warps, c.key_warps, c.tiles
    split, general, alibi, dropout = c.split, c.general, c.alibi, c.dropout
    warp_keys, warp_rows = keys // key_warps, 16 * tiles
    key_tiles, value_tiles = warp_keys // 8, 2 * -(-c.Dv // 16)
    scored, summed, halves = 4 * tiles * key_tiles, 4 * tiles * value_tiles, 2 * tiles
    key_bytes, value_bytes = tile_bytes(keys, c.D), tile_bytes(keys, c.Dv)
    keys_at = tile_bytes(rows, c.D)
    values_at = keys_at + stages * key_bytes
    block_at = values_at + stages * value_bytes
    rows_at, every_row = block_at + BLOCK_BYTES, c.row_bytes
    row_step = 8 * every_row  # a thread has every eighth row
    nothing, masked_everywhere = -math.inf, bool(c.mask)

    sequence_of = make_sequence(cuda, ops)
    copy_queries = make_copy_packed(cuda, ops, rows, c.D, threads)
    copy_keys = make_copy(cuda, ops, keys, c.D, threads)
    copy_values = make_copy(cuda, ops, keys, c.Dv, threads)
    not_finite, clean = make_not_finite(cuda, ops, c.kind, keys, c.Dv, threads)
    scores = make_scores(cuda, ops, c.kind, c.D, tiles, key_tiles)
    transform = make_transform(cuda, ops, tiles, key_tiles, c.softcap, alibi, row_step)
    hide = make_hide(cuda, ops, tiles, key_tiles, c.mask, row_step)
    softmax = make_softmax(cuda, ops, tiles, key_tiles, value_tiles, general, c.entropy)
    unit_of = make_unit(cuda, ops)
    drop = make_drop(cuda, ops, tiles, key_tiles, row_step)
    accumulate = make_accumulate(cuda, ops, c.kind, c.Dv, tiles, key_tiles)
    add_odd = make_add_odd(cuda, ops, c.kind, c.Dv, tiles, key_tiles)
    write_results = make_write_results(cuda, ops, c.kind, c.Dv, tiles, general)
    write_parts = make_write_parts(cuda, ops, c.Dv, tiles)
    join_warps = make_join_warps(cuda, ops, c.Dv, tiles, row_warps, key_warps, general)

    @cuda.jit(device=True, inline="always")
    def number_of(blocks, heads):
        """Of the sequence and head together, of the block of its rows or keys, and of either alone."""
        number = i32(cuda.blockIdx.x)
        over = ops.quotient(number, blocks)
        sequence = ops.quotient(over, heads)
        return over, i32(number - over * blocks), sequence, i32(over - sequence * heads)

    def flash(
        query, key, value, mask, out, lse, max_score, entropy, slopes, sinks, table, parts, part_sums,
        query_batch, query_head, key_batch, key_head, value_batch, value_head,
        mask_batch, mask_head, mask_row, mask_column, out_batch, out_head, out_row, out_column,
        statistic_batch, statistic_head, statistic_row, slopes_batch, offset, left, right, threshold,
        query_row, key_row, value_row, heads, group, Lq, Lk, blocks, chunk, fewest, most, padded, wide,
        seed_low, seed_high, scale, unit, coarse, limit, cap, gain,
    ):  # fmt: skip
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        row_warp, key_warp = i32(warp % row_warps), i32(warp // row_warps)
        over, block, sequence, head = number_of(blocks, heads)
        ahead, query_length, key_length, at_query, at_key, at_value, at_mask, _, _ = sequence_of(
            table, sequence, offset, Lq, Lk,
            query_batch, key_batch, value_batch, mask_batch, out_batch, statistic_batch,
        )  # fmt: skip
        valid = i32(query_length * group)
        if valid <= fewest or valid > most:
            return
        # The longest rows first, where there is more than one block of them.
        first_row = i32(0) if split else i32((blocks - 1 - block) * rows)
        shared = ops.shared_address(cuda.shared.array(0, ops.u8, alignment=128))

        # Keys that some of the rows may attend to, and those that every one may.
        last_row = ops.least(i64(first_row + rows), i64(valid)) - 1
        start = i64(ops.quotient(first_row, group)) + ahead
        end = i64(ops.quotient(i32(ops.most(last_row, 0)), group)) + ahead
        some_low, some_high = ops.most(start - left, 0), ops.least(key_length, end + right + 1)
        every_low = i32(ops.least(ops.most(end - left, 0), key_length))
        every_high = i32(ops.most(ops.least(start + right + 1, key_length), 0))
        if split:
            some_low = ops.most(some_low, i64(block) * i64(chunk))
            some_high = ops.least(some_high, i64(block + 1) * i64(chunk))
        tile, stop = i32(0), i32(0)
        if some_low < some_high and first_row < valid:
            tile, stop = i32(some_low // keys), i32((some_high + keys - 1) // keys)
        begun = tile < stop

        warp_row, warp_key = i32(row_warp * warp_rows), i32(key_warp * warp_keys)
        # The thread's own rows.
        own_rows = i32(shared + rows_at + (key_warp * rows + warp_row + (lane >> 2)) * every_row)
        for row in range(halves):
            here = i32(own_rows + row * row_step)
            packed = i32(first_row + warp_row + 8 * row + (lane >> 2))
            i = ops.quotient(packed, group)
            h = i32(head * group + packed - i * group)
            position = i64(i) + ahead
            low = i32(ops.least(ops.most(position - left, 0), key_length))
            high = i32(ops.most(ops.least(position + right + 1, key_length), 0))
            ops.store_shared_i32(True, i32(here + ROW.low), low)
            ops.store_shared_i32(True, i32(here + ROW.high), cuda.selp(packed < valid, high, i32(0)))
            if masked_everywhere:
                mask_at = i64(mask + at_mask + i64(h) * mask_head + i64(i) * mask_row)
                ops.store_shared_i64(True, i32(here + ROW.mask), mask_at)
            if alibi:
                at = i64(slopes + 4 * (i64(sequence) * slopes_batch + h))
                ops.store_shared_i32(True, i32(here + ROW.position), i32(position))
                ops.store_shared_f32(i32(here + ROW.slope), ops.load_f32(packed < valid, at, f32(0)))
            if dropout:
                ops.store_shared_i32(True, i32(here + ROW.number), i)
                ops.store_shared_i32(True, i32(here + ROW.head), h)

        s, seen = cuda.local.array(scored, f32), cuda.local.array(tiles, i32)
        sums, top = cuda.local.array(summed, f32), cuda.local.array(halves, f32)
        total, spread = cuda.local.array(halves, f32), cuda.local.array(halves, f32)
        for n in range(summed):
            sums[n] = f32(0)
        for row in range(halves):
            top[row], total[row], spread[row] = f32(nothing), f32(0), f32(0)

        known = i32(shared + block_at)
        if begun:
            key_source = i64(key + at_key + i64(head) * key_head)
            query_source = i64(query + at_query + i64(head * group) * query_head)
            copy_queries(shared, query_source, query_row, query_head, group, first_row, valid, thread)
            slot = i32(shared + keys_at + (tile & (stages - 1)) * key_bytes)
            first_key = i32(tile * keys)
            copy_keys(slot, key_source, key_row, first_key, i32(key_length - first_key), thread)
            ops.commit_copies()
            # Read in each turn, as registers are for what all of it needs.
            ops.store_shared_i32(thread == 0, i32(known + BLOCK.low), every_low)
            ops.store_shared_i32(thread == 0, i32(known + BLOCK.high), every_high)
            ops.store_shared_i32(thread == 0, i32(known + BLOCK.stop), stop)
            ops.store_shared_i32(thread == 0, i32(known + BLOCK.length), i32(key_length))
            ops.store_shared_i64(thread == 0, i32(known + BLOCK.keys), key_source)
            value_source = i64(value + at_value + i64(head) * value_head)
            ops.store_shared_i64(thread == 0, i32(known + BLOCK.values), value_source)
            cuda.syncthreads()
        more = begun
        while more:
            first_key = i32(tile * keys)
            keys_here = i32(shared + keys_at + (tile & (stages - 1)) * key_bytes)
            values_here = i32(shared + values_at + (tile & (stages - 1)) * value_bytes)
            rest = i32(ops.load_alike_i32(i32(known + BLOCK.length)) - first_key)
            partial = masked_everywhere
            if not masked_everywhere:
                every_low = ops.load_alike_i32(i32(known + BLOCK.low))
                every_high = ops.load_alike_i32(i32(known + BLOCK.high))
                partial = first_key < every_low or first_key + keys > every_high
            odd = False
            if stages == 1:
                ops.wait_for_all_copies()
                cuda.syncthreads()
            value_source = ops.load_alike_i64(i32(known + BLOCK.values))
            copy_values(values_here, value_source, value_row, first_key, rest, thread)
            ops.commit_copies()
            if stages == 2:
                ops.wait_for_all_but_last()
                cuda.syncthreads()
            scores(s, shared, warp_row, keys_here, warp_key, lane)
            if stages == 1:
                ops.wait_for_all_copies()
                if partial:
                    odd = cuda.syncthreads_or(i32(not_finite(values_here, thread))) != 0
                else:
                    cuda.syncthreads()
            tile = i32(tile + 1)
            more = tile < ops.load_alike_i32(i32(known + BLOCK.stop))
            if more:
                slot = i32(shared + keys_at + (tile & (stages - 1)) * key_bytes)
                key_source = ops.load_alike_i64(i32(known + BLOCK.keys))
                copy_keys(slot, key_source, key_row, i32(first_key + keys), i32(rest - keys), thread)
            ops.commit_copies()

            thread_key = i32(first_key + warp_key + 2 * (lane & 3))
            if general:
                transform(s, scale, cap, own_rows, thread_key)
            if partial:
                hide(s, seen, own_rows, mask_column, thread_key)
            softmax(s, sums, top, total, spread, unit, coarse, limit)
            if dropout:
                first = i32(first_key + warp_key)
                drop(s, first, own_rows, sequence, seed_low, seed_high, threshold, lane)

            if stages == 2:
                ops.wait_for_all_but_last()
                if partial:
                    odd = cuda.syncthreads_or(i32(not_finite(values_here, thread))) != 0
                else:
                    cuda.syncthreads()
            if odd:
                add_odd(sums, seen, values_here, warp_key, lane)
                cuda.syncthreads()
                clean(values_here, thread)
                cuda.syncthreads()
            accumulate(sums, s, values_here, warp_key, lane)

        for row in range(halves):
            for step in range(1, 3):
                total[row] = f32(total[row] + ops.exchange_f32(total[row], step))
                spread[row] = f32(spread[row] + ops.exchange_f32(spread[row], step))
            if not general:
                top[row] = ops.product(top[row], unit_of(top[row], unit, coarse, limit))
        ops.wait_for_all_copies()
        cuda.syncthreads()
        # Found once more, instead of being kept in registers all the while.
        over, block, sequence, head = number_of(blocks, heads)
        _, query_length, _, _, _, _, _, at_out, at_statistic = sequence_of(
            table, sequence, offset, Lq, Lk,
            query_batch, key_batch, value_batch, mask_batch, out_batch, statistic_batch,
        )  # fmt: skip
        valid = i32(query_length * group)
        # Packed sequences have no more rows than these; results of others have rows for all that there may be.
        every = i32(Lq * group) if padded != 0 else valid
        first_row = i32(0) if split else i32((blocks - 1 - block) * rows)
        place = i64((i64(over) * blocks + block) * rows)
        if key_warps > 1:
            join_warps(
                sums, top, total, spread, shared, warp_row, key_warp, parts, part_sums, place, valid, begun, thread
            )
        elif split:
            write_parts(sums, top, total, spread, parts, part_sums, place, i32(warp_row), valid, begun, lane)
        else:
            write_results(
                sums, top, total, spread, shared, warp_row, first_row, valid, every, lane,
                i64(out + at_out), out_head, out_row, out_column, wide, lse, max_score, entropy,
                at_statistic, statistic_head, statistic_row, sinks, head, group, scale, coarse, gain,
            )  # fmt: skip

    return flash
