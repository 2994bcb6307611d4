"""Rotary embedding: pairs of numbers of every row, rotated by the angles of a table's row.  See `numba_attn.rotary`."""

from __future__ import annotations

from functools import partial

import numpy as np
from llvmlite import ir
from numba import types

from numba_attn import threads
from numba_attn.cpu import launch, narrow
from numba_attn.cpu.emits import emits
from numba_attn.cpu.jit import device, kernel
from numba_attn.cpu.narrow import COMPUTED, STORED, bits_of, kind_of
from numba_attn.cpu.pointers import address, moved
from numba_attn.cpu.simd import BYTES, Value
from numba_attn.cpu.workers import by_workers

ROWS = 64  # of a task
SERIAL_SIZE = 1 << 16  # numbers that are rotated sooner than the threads are woken


def _rotate(v, x, x_step, out, out_step, cos, sin, half, interleaved):
    """Pairs (a, b) of a row x become (cos a - sin b, sin a + cos b) of a row out, which may be x."""
    stored = v.pointees["x"]
    size = BYTES[stored]

    def turned(a: Value, b: Value, c: Value, s: Value) -> tuple[Value, Value]:
        return v.sub(v.mul(c, a), v.mul(s, b)), v.add(v.mul(s, a), v.mul(c, b))

    def pairs(i: Value, _: list[Value], scalar: bool, gap: Value, step: int) -> list[Value]:
        """Pairs from the i-th on, a vector of them or one: their numbers `gap` elements apart."""
        first = v.mul_index(i, step)
        places = [v.mul_index(first, size), v.mul_index(v.add_index(first, gap), size)]
        to = places
        if scalar:
            places = [v.mul_index(d, x_step) for d in (first, v.add_index(first, gap))]
            to = [v.mul_index(d, out_step) for d in (first, v.add_index(first, gap))]
        a, b = (narrow.load(v, x, at, stored, scalar) for at in places)
        c, s = (narrow.load(v, table, v.mul_index(i, v.size), v.dtype, scalar) for table in (cos, sin))
        for result, at in zip(turned(a, b, c, s), to, strict=True):
            narrow.store(v, result, out, at, stored)
        return []

    def neighbours(i: Value, _: list[Value]) -> list[Value]:
        """A vector of pairs whose numbers are side by side."""
        at = [v.mul_index(v.add_index(v.mul_index(i, 2), n * v.lanes), size) for n in range(2)]
        low, high = (narrow.load(v, x, place, stored) for place in at)
        a, b = (v.shuffle(low, high, range(n, 2 * v.lanes, 2)) for n in range(2))
        c, s = (v.load(table, v.mul_index(i, v.size)) for table in (cos, sin))
        a, b = turned(a, b, c, s)
        order = [lane // 2 + lane % 2 * v.lanes for lane in range(2 * v.lanes)]
        for place, lanes in zip(at, (order[: v.lanes], order[v.lanes :]), strict=True):
            narrow.store(v, v.shuffle(a, b, lanes), out, place, stored)
        return []

    contiguous = v.builder.and_(*(v.builder.icmp_signed("==", step, v.index(size)) for step in (x_step, out_step)))
    whole = v.builder.select(contiguous, v.whole_steps(v.index(0), half, v.lanes), v.index(0))

    def side_by_side() -> None:
        v.loop(0, whole, v.lanes, [], neighbours)
        v.loop(whole, half, 1, [], partial(pairs, scalar=True, gap=v.index(1), step=2))

    def in_halves() -> None:
        v.loop(0, whole, v.lanes, [], partial(pairs, scalar=False, gap=half, step=1))
        v.loop(whole, half, 1, [], partial(pairs, scalar=True, gap=half, step=1))

    v.choose(interleaved, {0: in_halves, 1: side_by_side})


def _copy(v, x, x_step, out, out_step, first, end):
    """Elements [first, end) of a row, as they are."""
    bits = ir.IntType(8 * BYTES[v.pointees["x"]])

    def element(d: Value, _: list[Value]) -> list[Value]:
        v.store(v.load_scalar(x, v.mul_index(d, x_step), element=bits), out, v.mul_index(d, out_step))
        return []

    v.loop(first, end, 1, [], element)


rotate, copy = emits(_rotate), emits(_copy)


@device
def rotate_rows(x, cos, sin, out, b, h, first, end, offset, interleaved):
    """The rows [first, end) of head h of sequence b; the table has that of row 0 at `offset`."""
    D, half = x.shape[3], cos.shape[2]
    table = b if cos.shape[0] > 1 else 0
    for i in range(first, end):
        here = moved(address(x), b * x.strides[0] + h * x.strides[1] + i * x.strides[2])
        to = moved(address(out), b * out.strides[0] + h * out.strides[1] + i * out.strides[2])
        c = moved(address(cos), table * cos.strides[0] + (offset + i) * cos.strides[1])
        s = moved(address(sin), table * sin.strides[0] + (offset + i) * sin.strides[1])
        rotate(here, x.strides[3], to, out.strides[3], c, s, half, interleaved)
        copy(here, x.strides[3], to, out.strides[3], 2 * half, D)


@device
def do_tasks(worker, memories, counters, x, cos, sin, out, offsets, interleaved):
    """Do tasks until there are none: some rows of one head each."""
    helped = 0
    while True:
        b, h, first, helped = launch.take_rows(counters, worker, helped, x.shape, ROWS)
        if b < 0:
            break
        offset = offsets[b if offsets.shape[0] > 1 else 0]
        rotate_rows(x, cos, sin, out, b, h, first, min(first + ROWS, x.shape[2]), offset, interleaved)


do_all_tasks = by_workers(do_tasks)


@kernel
def turn(launcher, memories, counters, x, cos, sin, out, offsets, interleaved):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, x, cos, sin, out, offsets, interleaved)


# From Python ----------------------------------------------------------------------------------------------------------


def run(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray, offsets: np.ndarray, interleaved: bool
) -> None:
    """Rotate x (B, H, L, D) into out, row i of sequence b by row offsets[b] + i of tables (B or 1, positions, R / 2).

    There is one offset, or one for each sequence.  The tables are of the type that x is computed in, their rows
    contiguous.
    """
    B, H, L, _ = x.shape
    kind, tasks = kind_of(x.dtype), B * H * -(-L // ROWS)
    if not x.size:
        return
    workers = min(threads.count(), tasks) if x.size > SERIAL_SIZE else 1
    arguments = bits_of(x), cos, sin, bits_of(out), offsets, int(interleaved)
    start = launch.prepared(entry, (kind,), workers, tasks, 4.0 * x.size, 16, cos.dtype)
    start(*arguments)


def signature(kind: str) -> tuple[types.Type, ...]:
    """Of `turn`, for a kind of element."""
    given = types.Array(STORED[kind], 4, "A", readonly=True, aligned=False)
    table = types.Array(COMPUTED[kind], 3, "A", readonly=True, aligned=False)
    return launch.signature_of(
        COMPUTED[kind],
        *(given, table, table, types.Array(STORED[kind], 4, "A", aligned=False)),
        *(types.Array(types.int64, 1, "C"), types.int64),
    )


entry = launch.entry(turn, signature)


def warmup() -> list[str]:
    """Compile the kernel for every kind of element, or load it from the cache; returns their names."""
    for kind in COMPUTED:
        entry(kind)
    return [f"{__name__}, {kind}" for kind in COMPUTED]
