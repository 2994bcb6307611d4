"""What is written for a query row beside its output."""

from __future__ import annotations

import math
from collections import namedtuple

from numba_attn.cpu import pack
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import address, get, moved, put
from numba_attn.cpu.score import matrix
from numba_attn.cpu.softmax import COARSE, COARSE_DOUBLE

LN_2 = math.log(2.0)

# One number a row of a head, or two: the address of the first, the bytes from row to row, and whether they are wanted.
Column = namedtuple("Column", "data row wanted")


@device
def column_of(array, b_offset, h):
    """Of head h of the sequence that starts `b_offset` bytes after the first element of an array (heads, rows)."""
    return Column(moved(address(array), b_offset + h * array.strides[0]), array.strides[1], array.size > 0)


@device
def statistics_of(arrays, sequences, b, h):
    """The columns of lse, max_score, entropy and norms of a head."""
    offsets = sequences.offsets
    return (
        column_of(arrays.lse, offsets[b, 5], h),
        column_of(arrays.max_score, offsets[b, 6], h),
        column_of(arrays.entropy, offsets[b, 7], h),
        norms_of(arrays, sequences, b, h),
    )


@device
def norms_of(arrays, sequences, b, h):
    """Of a head, what its probabilities can be made of again: of each row, the reference and log2 of the sum.

    They are p = exp2(s - reference - log2(sum)), of scores s in base 2.  An lse would not do: where scores are large,
    as those of a row that is masked with -1e9 are, the logarithm of the sum is lost in it.
    """
    return column_of(arrays.norms, sequences.offsets[b, 9], h)


@device
def read(column, row):
    return get(column.data, row * column.row)


@device
def read_norm(norms, row):
    """The reference of a row, and log2 of its sum."""
    return read(norms, row), get(norms.data, row * norms.row + norms.row // 2)


@device
def write(column, row, value):
    if column.wanted:
        put(column.data, row * column.row, value)


@device
def write_norm(norms, row, reference, total):
    """Where nothing is attended to, the total is 0, and so is to be every probability."""
    if norms.wanted:
        put(norms.data, row * norms.row, reference)
        put(norms.data, row * norms.row + norms.row // 2, math.inf if total == 0 else math.log2(total))


@device
def read_norms(arrays, sequences, b, h, first, rows, heads, stride, lanes, memory, at, sums):
    """Put norms of the rows of a block in memory, references and those of sums, which are infinite without a row.

    They are `rows` from the first one on of each of some heads from h on, in so many lanes: again in each `stride` of
    them.  Returns whether some reference is coarse, see `softmax`.
    """
    coarse, most, lane = False, COARSE if memory.itemsize == 4 else COARSE_DOUBLE, 0
    for head in range(h, h + heads):
        norms = norms_of(arrays, sequences, b, head)
        for row in range(first, first + rows):
            memory[at + lane], memory[sums + lane] = read_norm(norms, row)
            coarse = coarse or abs(memory[at + lane]) > most
            lane += 1
    for other in range(lane, lanes):
        memory[at + other] = memory[at + (lane - 1 if other < stride else other - stride)]
        memory[sums + other] = math.inf if other < stride else memory[sums + other - stride]
    return coarse


@device
def any_wanted(statistics):
    lse, max_score, entropy, norms = statistics
    return lse.wanted or max_score.wanted or entropy.wanted or norms.wanted


@device
def write_statistics(statistics, row, reference, total, moment, best):
    """Write what is wanted of a row's statistics, from its state; see `tiles`."""
    lse, max_score, entropy, norms = statistics
    write_norm(norms, row, reference, total)
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
        lse, max_score, entropy, norms = statistics_of(arrays, sequences, b, h)
        out, zero = matrix(arrays.out, sequences.offsets[b, 4], h), arrays.lse.dtype.type(0)
        padding = moved(out.data, first * out.row)
        pack.fill(padding, out.row, out.step, end - first, arrays.out.shape[2], zero)
        for row in range(first, end):
            write(lse, row, arrays.sinks[h] * LN_2 if arrays.sinks.size else -math.inf)
            write(max_score, row, -math.inf)
            write(entropy, row, 0.0)
            if arrays.sinks.size:
                write_norm(norms, row, arrays.sinks[h], zero + 1)
            else:
                write_norm(norms, row, zero, zero)
