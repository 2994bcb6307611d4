"""How the rows of keys and values are read in order: where they are, and how far ahead they are asked for."""

from __future__ import annotations

from numba_attn.cpu import target
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import pointee_bytes
from numba_attn.cpu.stored import Rows, copy_rows, is_quantized, offset_of, rows_together
from numba_attn.cpu.walk import ALONE, FEW, FEW_OF_VALUES, FEW_QUANTIZED

# Bytes of K, and of V, that are asked for before they are needed, see `dots`: less comes too late, more pushes out what
# is still to come.  Into the second-level cache, for few query rows next to nothing, as hardware keeps up alone, or
# nothing, where rows are so short that asking takes longer than it saves; and for more rows, or pages, as much as is
# near.  Quantised rows lie across cache lines: K of such is asked for in pages alone, and of V, for more query rows, a
# tile, as its scales are read first.
SHORT, FEW_AHEAD, AHEAD, QUANTIZED_AHEAD, QUANTIZED_PAGES_AHEAD = (
    (0, *[(8 * 1024, 128 * 1024)] * 4)
    if target.PREFETCH == 3
    else (256, (0, 1024), (16 * 1024, 16 * 1024), (0, 64 * 1024), (8 * 1024, 64 * 1024))
    if target.MANY_REGISTERS
    else (256, (0, 0), (16 * 1024, 16 * 1024), (8 * 1024, 64 * 1024), (8 * 1024, 64 * 1024))
)
PAGES_FORESEEN = ALONE and not target.MANY_REGISTERS  # with their first lines asked for, see `walk`
MOST_AHEAD = 512  # rows of them
MANY = 1 << 32  # rows, more than any tile has


@device
def is_read_in_place(rows, columns, lanes):
    """Whether rows are whole vectors in memory."""
    return is_quantized(rows) or (rows.step == pointee_bytes(rows.data) and columns % lanes == 0)


@device
def list_rows(rows, first, count, end, table):
    """Fill a table with the offsets of `count` rows from the first one on, the one before `end` again beyond it."""
    exist = min(count, end - first)
    done = 0
    while done < exist:
        n = rows_together(rows, first + done, exist - done)
        start = offset_of(rows, first + done)
        for i in range(n):
            table[done + i] = start + i * rows.row
        done += n
    for i in range(exist, count):
        table[i] = table[exist - 1]


@device
def place(rows, low, high, end, columns, padded, lanes, ahead, table, copies):
    """The rows [low, high), in place or copied, filled up to `padded` columns; their offsets are put into a table.

    So are those of the rows `ahead`, which are asked for; of copies the last one again.
    """
    if is_read_in_place(rows, columns, lanes):
        list_rows(rows, low, high - low + ahead, end, table)
        return rows
    size = pointee_bytes(copies)
    copy = Rows(copies, padded * size, size, rows.pages, 0, 0)
    copy_rows(rows, low, high - low, columns, padded, copies)
    list_rows(copy, 0, high - low + ahead, high - low, table)
    return copy


@device
def pages_from(rows, j):
    """How many rows from row j on lie in its page, and in each of the others, see `Walk`."""
    return rows_together(rows, j, MANY), rows.page_rows if rows.page_rows != 0 else MANY


@device
def rows_ahead(rows, columns, height, which):
    """Rows of K (which is 0) or of V (1) that are asked for ahead, for so many query rows."""
    length, quantized = max(1, columns * pointee_bytes(rows.data)), is_quantized(rows)
    few = FEW_QUANTIZED if quantized else FEW if which == 0 else FEW_OF_VALUES
    if height <= few and (rows.page_rows == 0 or (PAGES_FORESEEN and not quantized)):
        some = 0 if length <= SHORT else FEW_AHEAD[which]
    elif quantized:
        some = QUANTIZED_AHEAD[which] if rows.page_rows == 0 else QUANTIZED_PAGES_AHEAD[which]
    else:
        some = AHEAD[which]
    return min(MOST_AHEAD, some // length)
