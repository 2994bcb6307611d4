"""From the parts that `flash` has written of rows to their results, in the order of the keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba_attn.cuda.flash_results import STATISTICS_BYTES, part_columns
from numba_attn.cuda.row_results import LOG2_E, make_finish
from numba_attn.cuda.sequences import make_sequence


class Combination(NamedTuple):
    """What the kernel is compiled for."""

    kind: str
    Dv: int
    rows: int  # of a part
    general: bool

    @property
    def threads(self) -> int:
        return -(-self.Dv // 32) * 32


def make_combine(cuda: Any, ops: Any, kind: str, Dv: int, rows: int, general: bool) -> Any:
    """The kernel of a `Combination`: a block has a row, a thread an element of it."""
    i16, i32, i64, f32 = ops.i16, ops.i32, ops.i64, ops.f32
    pack = ops.pack_bfloat16 if kind == "bfloat16" else ops.pack_float16
    columns, nothing, base = part_columns(Dv), -math.inf, LOG2_E if general else 1.0
    sequence_of, finish = make_sequence(cuda, ops), make_finish(cuda, ops, general)

    def combine(
        query, key, value, mask, out, lse, max_score, entropy, slopes, sinks, table, parts, part_sums,
        query_batch, query_head, key_batch, key_head, value_batch, value_head,
        mask_batch, mask_head, mask_row, mask_column, out_batch, out_head, out_row, out_column,
        statistic_batch, statistic_head, statistic_row, slopes_batch, offset, left, right, threshold,
        query_row, key_row, value_row, heads, group, Lq, Lk, blocks, chunk, fewest, most, padded, wide,
        seed_low, seed_high, scale, unit, coarse, limit, cap, gain,
    ):  # fmt: skip
        thread = i32(cuda.threadIdx.x)
        lane = i32(thread & 31)
        number = i32(cuda.blockIdx.x)
        every = i32(Lq * group)
        over = ops.quotient(number, every)
        packed = i32(number - over * every)
        sequence = ops.quotient(over, heads)
        i = ops.quotient(packed, group)
        h = i32((over - sequence * heads) * group + packed - i * group)
        _, query_length, _, _, _, _, _, at_out, at_statistic = sequence_of(
            table, sequence, offset, Lq, Lk,
            query_batch, key_batch, value_batch, mask_batch, out_batch, statistic_batch,
        )  # fmt: skip
        valid = i32(query_length * group)
        if valid <= fewest or valid > most or (padded == 0 and packed >= valid):
            return
        # Parts are 32 at a time, one a lane; those of no keys weigh nothing.
        stop = blocks if packed < valid else i32(0)
        first_part = i64(i64(over) * blocks * rows + packed)
        high = f32(nothing)
        begin = i32(0)
        while begin < stop:
            part = i32(begin + lane)
            at = i64(parts + (first_part + i64(part) * rows) * STATISTICS_BYTES)
            high = ops.maximum(high, ops.load_f32(part < stop, at, f32(nothing)))
            begin = i32(begin + 32)
        for bit in range(5):
            high = ops.maximum(high, ops.exchange_f32(high, 1 << bit))
        level = cuda.selp(high == f32(nothing), f32(0), high)
        weight, moment, x = f32(0), f32(0), f32(0)
        begin = i32(0)
        while begin < stop:
            part = i32(begin + lane)
            at = i64(parts + (first_part + i64(part) * rows) * STATISTICS_BYTES)
            own_top = ops.load_f32(part < stop, at, f32(nothing))
            # Of a part without keys there are no sums; one whose weight is 0 may have sums that are not finite.
            begun = cuda.selp(own_top == f32(nothing), f32(0), f32(1))
            fall = ops.product(f32(own_top - level), f32(base))
            shrink = ops.exp2(fall)
            fall = cuda.selp(shrink == f32(0), f32(0), fall)
            own_weight = ops.load_f32(part < stop, i64(at + 4), f32(0))
            own_moment = ops.multiply_add(own_weight, fall, ops.load_f32(part < stop, i64(at + 8), f32(0)))
            weight = ops.multiply_add(shrink, own_weight, weight)
            moment = ops.multiply_add(shrink, own_moment, moment)
            n = i32(0)
            while n < 32:
                # Eight at a time, so that as many loads are under way.
                for step in range(8):
                    by = ops.value_of_lane(shrink, i32(n + step))
                    part = i32(begin + n + step)
                    at = i64(part_sums + 4 * ((first_part + i64(part) * rows) * columns + thread))
                    wanted = (ops.value_of_lane(begun, i32(n + step)) != f32(0)) & (part < stop) & (thread < columns)
                    own = ops.load_f32(wanted, at, f32(0))
                    x = ops.multiply_add(by, own, x)
                n = i32(n + 8)
            begin = i32(begin + 32)
        for bit in range(5):
            weight = f32(weight + ops.exchange_f32(weight, 1 << bit))
            moment = f32(moment + ops.exchange_f32(moment, 1 << bit))
        sink = ops.load_f32(sinks != 0, i64(sinks + 4 * h), f32(nothing))
        factor, row_lse, largest, row_entropy = finish(high, weight, moment, sink, scale, coarse)
        x = ops.product(x, ops.product(factor, gain))
        at = i64(out + at_out + i64(h) * out_head + i64(i) * out_row + i64(thread) * out_column)
        ops.store_i16(thread < Dv, at, i16(pack(x, x)))
        once = thread == 0
        at = i64(at_statistic + i64(h) * statistic_head + i64(i) * statistic_row)
        ops.store_f32(once & (lse != 0), i64(lse + at), row_lse)
        ops.store_f32(once & (max_score != 0), i64(max_score + at), largest)
        ops.store_f32(once & (entropy != 0), i64(entropy + at), row_entropy)

    return combine
