"""What is written for a query row beside its output."""

from __future__ import annotations

import math

from numba_attn.cpu import pack
from numba_attn.cpu.jit import device
from numba_attn.cpu.score import matrix
from numba_attn.cpu.simd import moved

LN_2 = math.log(2.0)


@device
def write_statistics(lse, max_score, entropy, row, reference, total, moment, best):
    """Of (Lq,) lse, max_score and entropy, write what is not empty, from the state of a row; see `tiles`."""
    if lse.size:
        lse[row] = -math.inf if total == 0 else (reference + math.log2(total)) * LN_2
    if max_score.size:
        max_score[row] = best * LN_2 if total == total else total
    if entropy.size:
        # Without a key, a sink may have a part in the total, but nothing is uncertain.
        empty = total == 0 or (best == -math.inf and total == total)
        entropy[row] = 0 if empty else (math.log2(total) - moment / total) * LN_2


@device
def of_head(rows, b, h):
    return rows[b, h] if rows.size else rows[0, 0]


@device
def fill_rows(rows, first, end, value):
    if rows.size:
        for row in range(first, end):
            rows[row] = value


@device
def statistics_of(arrays, b, h):
    """(Lq,) lse, max_score and entropy of a head; empty where they are not wanted."""
    return of_head(arrays.lse, b, h), of_head(arrays.max_score, b, h), of_head(arrays.entropy, b, h)


@device
def fill_padding(arrays, b_offset, b, h, first, end):
    """Write the rows [first, end) of a head, which are padding; `b_offset` is where the sequence's output starts."""
    lse, max_score, entropy = statistics_of(arrays, b, h)
    if first < end:
        out, zero = matrix(arrays.out, b_offset, h), arrays.lse.dtype.type(0)
        padding = moved(out.data, first * out.row)
        pack.fill(padding, out.row, out.step, end - first, arrays.out.shape[2], zero)
        fill_rows(lse, first, end, arrays.sinks[h] * LN_2 if arrays.sinks.size else -math.inf)
        fill_rows(max_score, first, end, -math.inf)
        fill_rows(entropy, first, end, 0.0)
