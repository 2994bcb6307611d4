"""Rows of keys or values wherever they are kept: one behind the other, in pages, as numbers or quantised."""

from __future__ import annotations

from collections import namedtuple

from numba_attn.cpu import pack
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import address, as_plain, moved, pointee_bytes
from numba_attn.cpu.visible import Matrix

# Of one head: the address of the first row, the bytes from row to row and from column to column; where there are pages
# (page_rows is not 0), these of the sequence, and the rows and bytes of each.
Rows = namedtuple("Rows", "data row step pages page_rows page_bytes")


@device
def rows_of(array, b_offset, h, pages, b, page_rows, page_bytes):
    """Head h of the sequence b, which starts `b_offset` bytes after an array's first element."""
    data = moved(address(array), b_offset + h * array.strides[0])
    return Rows(data, array.strides[1], array.strides[2], pages[b if page_rows else 0], page_rows, page_bytes)


@device
def is_quantized(rows):
    return pointee_bytes(rows.data) == 1


@device
def is_gathered(rows):
    """Whether rows are to be copied, a tile at a time, before they are a matrix."""
    return rows.page_rows != 0 or is_quantized(rows)


@device
def offset_of(rows, j):
    """Where row j starts, in bytes."""
    if rows.page_rows == 0:
        return j * rows.row
    return rows.pages[j // rows.page_rows] * rows.page_bytes + j % rows.page_rows * rows.row


@device
def rows_together(rows, j, count):
    """Of `count` rows from j on, how many lie one behind the other."""
    return count if rows.page_rows == 0 else min(count, rows.page_rows - j % rows.page_rows)


@device
def in_place(rows, memory):
    """Rows that are not gathered, as a matrix."""
    return Matrix(as_plain(rows.data, rows.data, memory), rows.row, rows.step)


@device
def copy_rows(rows, first, n, columns, padded, out):
    """out (n, padded), contiguous, = the rows [first, first + n) of so many columns, and zeros."""
    size, done = pointee_bytes(out), 0
    while done < n:
        at = first + done
        count = rows_together(rows, at, n - done)
        start, here = offset_of(rows, at), moved(out, done * padded * size)
        done += count
        # The next page, which may be anywhere, or rows that follow.
        ahead = offset_of(rows, first + done) if done < n else start + pack.ROWS_AHEAD * rows.row
        data = moved(rows.data, start)
        pack.copy_page(data, moved(rows.data, ahead), rows.row, rows.step, count, columns, padded, here)


@device
def gather(rows, first, n, columns, memory, to):
    """Copy the rows [first, first + n) to the address `to` in memory: a matrix, in which they have the same numbers."""
    out = as_plain(to, rows.data, memory)
    size = pointee_bytes(out)
    copy_rows(rows, first, n, columns, columns, out)
    return Matrix(moved(out, -first * columns * size), columns * size, size)
