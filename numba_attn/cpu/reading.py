"""How the rows of keys and values are read in order: where they are, and how far ahead they are asked for."""

from __future__ import annotations

from numba_attn.cpu import pack, target
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import moved, pointee_bytes
from numba_attn.cpu.stored import is_quantized, offset_of, rows_together

# Bytes of K, and of V, that are asked for before they are needed, for one query row and for more, or for pages: less
# comes too late, more pushes out what is still to come.  Into the second-level cache, a little is best where hardware
# keeps up alone, and otherwise as much as is near, see `dots`.
K_AHEAD, V_AHEAD = {
    2: ((2 * 1024, 16 * 1024), (2 * 1024, 16 * 1024)),
    3: ((8 * 1024, 8 * 1024), (128 * 1024, 128 * 1024)),
}[target.PREFETCH]
# Of quantised rows, which lie across cache lines, and of which the scales of a tile's values are read first.
K_QUANTIZED, V_QUANTIZED = {
    2: ((8 * 1024, 0), (64 * 1024, 64 * 1024)),
    3: (K_AHEAD, V_AHEAD),
}[target.PREFETCH]
MOST_AHEAD = 512  # rows of them


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
def list_copies(count, row, table):
    """Fill a table with the offsets of the rows of a tile that have been copied."""
    for i in range(count):
        table[i] = i * row


@device
def copy_rows(rows, table, n, D, columns, out):
    """Copy the n rows of a table, filled up to whole vectors."""
    for i in range(n):
        to = moved(out, i * columns * pointee_bytes(out))
        pack.copy_rows(moved(rows.data, table[i]), 0, rows.step, 1, D, columns, to)


@device
def rows_ahead(rows, columns, height, ahead, of_quantized):
    case = int(height > 1 or rows.page_rows != 0)
    some = of_quantized[case] if is_quantized(rows) else ahead[case]
    return min(MOST_AHEAD, some // max(1, columns * pointee_bytes(rows.data)))


@device
def keys_ahead(rows, columns, height):
    """Rows of K that are asked for ahead, for so many query rows."""
    return rows_ahead(rows, columns, height, K_AHEAD, K_QUANTIZED)


@device
def values_ahead(rows, columns, height):
    return rows_ahead(rows, columns, height, V_AHEAD, V_QUANTIZED)
