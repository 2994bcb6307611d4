"""What is written for a query row beside its output."""

from __future__ import annotations

import math
from collections import namedtuple

from numba_attn.cpu import pack
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import address, get, moved, put
from numba_attn.cpu.score import matrix

LN_2 = math.log(2.0)

# One number a row of a head: the address of the first, the bytes from row to row, and whether they are wanted.
Column = namedtuple("Column", "data row wanted")


@device
def column_of(array, b_offset, h):
    """Of head h of the sequence that starts `b_offset` bytes after the first element of an array (heads, rows)."""
    return Column(moved(address(array), b_offset + h * array.strides[0]), array.strides[1], array.size > 0)


@device
def statistics_of(arrays, sequences, b, h):
    """The columns of lse, max_score and entropy of a head."""
    offsets = sequences.offsets
    return (
        column_of(arrays.lse, offsets[b, 5], h),
        column_of(arrays.max_score, offsets[b, 6], h),
        column_of(arrays.entropy, offsets[b, 7], h),
    )


@device
def read(column, row):
    return get(column.data, row * column.row)


@device
def write(column, row, value):
    if column.wanted:
        put(column.data, row * column.row, value)


@device
def any_wanted(statistics):
    lse, max_score, entropy = statistics
    return lse.wanted or max_score.wanted or entropy.wanted


@device
def write_statistics(statistics, row, reference, total, moment, best):
    """Write what is wanted of a row's statistics, from its state; see `tiles`."""
    lse, max_score, entropy = statistics
    # Asked first: a logarithm for every row would be a good part of a short call.
    if lse.wanted:
        write(lse, row, -math.inf if total == 0 else (reference + math.log2(total)) * LN_2)
    if max_score.wanted:
        write(max_score, row, best * LN_2 if total == total else total)
    if entropy.wanted:
        # Without a key, a sink may have a part in the total, but nothing is uncertain.
        empty = total == 0 or (best == -math.inf and total == total)
        write(entropy, row, 0 if empty else (math.log2(total) - moment / total) * LN_2)


@device
def fill_padding(arrays, sequences, b, h, first, end):
    """Write the rows [first, end) of a head, which are padding."""
    if first < end:
        lse, max_score, entropy = statistics_of(arrays, sequences, b, h)
        out, zero = matrix(arrays.out, sequences.offsets[b, 4], h), arrays.lse.dtype.type(0)
        padding = moved(out.data, first * out.row)
        pack.fill(padding, out.row, out.step, end - first, arrays.out.shape[2], zero)
        for row in range(first, end):
            write(lse, row, arrays.sinks[h] * LN_2 if arrays.sinks.size else -math.inf)
            write(max_score, row, -math.inf)
            write(entropy, row, 0.0)
