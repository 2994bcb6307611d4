"""Tiles of rows of 16-bit numbers in shared memory: where their elements are, and how they come there.

A row is chunks of 16 bytes.  The chunks of a row are permuted by its number, so that eight rows that `ldmatrix` reads
together, or the rows that a warp writes together, lie in different banks.
"""

from __future__ import annotations

from typing import Any, NamedTuple


def chunks_of(columns: int) -> int:
    """Of a row of so many elements, filled up with zeros to what the products take: a multiple of 16 elements."""
    return 2 * -(-columns // 16)


def row_chunks(columns: int) -> int:
    """The chunks from one row to the next: a power of two, or whole lines of all banks."""
    chunks = chunks_of(columns)
    return next((n for n in (2, 4) if chunks <= n), -(-chunks // 8) * 8)


def tile_bytes(rows: int, columns: int) -> int:
    return rows * row_chunks(columns) * 16


def make_address(cuda: Any, ops: Any, columns: int) -> Any:
    """A function (row, chunk) that gives bytes from the start of a tile."""
    i32 = ops.i32
    row_bytes, cycle = row_chunks(columns) * 16, min(row_chunks(columns), 8)
    shift = {2: 2, 4: 1, 8: 0}[cycle]

    @cuda.jit(device=True, inline="always")
    def address(row, chunk):
        return i32(row * row_bytes + ((chunk ^ ((row >> shift) & (cycle - 1))) << 4))

    return address


def make_stepped(cuda: Any, ops: Any, columns: int) -> Any:
    """A function (place, step) of where 16 elements further on is, so many steps from the first or second chunk."""
    i32 = ops.i32
    cycle = min(row_chunks(columns), 8)

    @cuda.jit(device=True, inline="always")
    def stepped(place, step):
        return i32((place ^ (32 * (step % (cycle // 2)))) + 16 * cycle * (step // (cycle // 2)))

    return stepped


def make_present(cuda: Any, ops: Any, columns: int) -> Any:
    """A function (chunk) of how many bytes of a chunk are elements, and not filled up."""
    i32, size, always = ops.i32, 2 * columns, columns % 16 == 0

    @cuda.jit(device=True, inline="always")
    def present(chunk):
        if always:
            return i32(16)
        left = i32(size - (chunk << 4))
        return cuda.selp(left < 16, cuda.selp(left < 0, i32(0), left), i32(16))

    return present


class Share(NamedTuple):
    """How the threads of a block share the chunks of a tile: each has one chunk of every so many rows."""

    shift: int  # of a thread's number, to that of its first row
    slots: int  # threads to a row, a power of two
    further: int  # rows from one to the next that a thread has
    steps: int
    exact: bool  # whether there is a chunk for every thread in every step

    @classmethod
    def of(cls, rows: int, columns: int, threads: int) -> Share:
        shift = (chunks_of(columns) - 1).bit_length()
        further = threads >> shift
        exact = rows % further == 0 and chunks_of(columns) == 1 << shift
        return cls(shift, 1 << shift, further, -(-rows // further), exact)


def make_place(cuda: Any, ops: Any, rows: int, columns: int, threads: int) -> Any:
    """Two functions: (row, chunk), whether there is such a chunk, and (first, step), where a thread's is in a step.

    `first` is where that of the first step is.  Its row is below `further`, so that the bits of later rows that permute
    chunks are beside its own.
    """
    i32 = ops.i32
    chunks, share = chunks_of(columns), Share.of(rows, columns, threads)
    exact, further, further_bytes = share.exact, share.further, share.further * row_chunks(columns) * 16

    @cuda.jit(device=True, inline="always")
    def inside(row, chunk):
        if exact:
            return True
        return (chunk < chunks) & (row < rows)

    @cuda.jit(device=True, inline="always")
    def place(first, step):
        return i32((first ^ (16 * (further * step & 7))) + step * further_bytes)

    return inside, place


def make_copy(cuda: Any, ops: Any, rows: int, columns: int, threads: int) -> Any:
    """A procedure (to, source, row_bytes, first, end, thread) that copies a tile, the rows of an array from `first` on.

    From `end` on, counted from there, they are zeros.
    """
    i32, i64 = ops.i32, ops.i64
    address, present = make_address(cuda, ops, columns), make_present(cuda, ops, columns)
    inside, place = make_place(cuda, ops, rows, columns, threads)
    _, slots, further, steps, _ = Share.of(rows, columns, threads)

    @cuda.jit(device=True, inline="always")
    def copy(to, source, row_bytes, first, end, thread):
        # A division, as what a shift gives would be kept in registers from tile to tile.
        first_row = ops.quotient(thread, slots)
        chunk = i32(thread - first_row * slots)
        begin, some = i32(to + address(first_row, chunk)), present(chunk)
        there = i64(ops.behind(source, i32(first + first_row), row_bytes) + i64(chunk << 4))
        for step in range(steps):
            row = i32(first_row + step * further)
            count = cuda.selp(row < end, some, i32(0))
            ops.copy_16(inside(row, chunk), place(begin, step), there, count)
            there = i64(there + further * i64(row_bytes))

    return copy


def make_copy_packed(cuda: Any, ops: Any, rows: int, columns: int, threads: int) -> Any:
    """A procedure (to, source, row_bytes, head_bytes, group, first, end, thread) that copies a tile of packed rows.

    These are those from `first` on, of heads that begin at `source`; from `end` on they are zeros.
    """
    i32, i64 = ops.i32, ops.i64
    address, present = make_address(cuda, ops, columns), make_present(cuda, ops, columns)
    inside, place = make_place(cuda, ops, rows, columns, threads)
    shift, slots, further, steps, _ = Share.of(rows, columns, threads)

    @cuda.jit(device=True, inline="always")
    def copy_packed(to, source, row_bytes, head_bytes, group, first, end, thread):
        first_row, chunk = i32(thread >> shift), i32(thread & (slots - 1))
        begin, some = i32(to + address(first_row, chunk)), present(chunk)
        for step in range(steps):
            row = i32(first_row + step * further)
            packed = i32(first + row)
            i = ops.quotient(packed, group)
            g = i32(packed - i * group)
            count = cuda.selp(packed < end, some, i32(0))
            there = i64(source + i64(g) * head_bytes + i64(i) * i64(row_bytes) + i64(chunk << 4))
            ops.copy_16(inside(row, chunk), place(begin, step), there, count)

    return copy_packed


def make_not_finite(cuda: Any, ops: Any, kind: str, rows: int, columns: int, threads: int) -> Any:
    """Two functions (tile, thread) about the part of a tile that `copy` has copied for this thread.

    The first: is any element infinite or NaN?  The second makes zeros of those that are.
    """
    i32 = ops.i32
    address = make_address(cuda, ops, columns)
    inside, place = make_place(cuda, ops, rows, columns, threads)
    shift, slots, further, steps, _ = Share.of(rows, columns, threads)
    exponent, unit = exponents(kind)

    @cuda.jit(device=True, inline="always")
    def not_finite(tile, thread):
        words = cuda.local.array(4, i32)
        first_row, chunk = i32(thread >> shift), i32(thread & (slots - 1))
        first, found = i32(tile + address(first_row, chunk)), i32(0)
        for step in range(steps):
            row = i32(first_row + step * further)
            ops.load_shared_16(words, 0, inside(row, chunk), place(first, step))
            for w in range(4):
                found = i32(found | ((words[w] & exponent) + unit))
        return (found & 0x80008000) != 0

    @cuda.jit(device=True, inline="always")
    def clean(tile, thread):
        words = cuda.local.array(4, i32)
        first_row, chunk = i32(thread >> shift), i32(thread & (slots - 1))
        first = i32(tile + address(first_row, chunk))
        for step in range(steps):
            row = i32(first_row + step * further)
            there = place(first, step)
            ops.load_shared_16(words, 0, inside(row, chunk), there)
            for w in range(4):
                odd = i32((((words[w] & exponent) + unit) >> 15) & 0x00010001)
                cleaned = i32(words[w] & ~(odd * 0xFFFF))
                ops.store_shared_i32(inside(row, chunk), i32(there + 4 * w), cleaned)

    return not_finite, clean


def exponents(kind: str) -> tuple[int, int]:
    """The exponent bits of both numbers of a register, and what overflows into the sign if they are all set."""
    return {"bfloat16": (0x7F807F80, 0x00800080), "float16": (0x7C007C00, 0x04000400)}[kind]
