"""Keys and values as rows of integers: what `numba_attn.storage.quantize` does, to the same bits, in one pass."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from numba_attn import threads
from numba_attn.cpu import launch, pack
from numba_attn.cpu.emits import emits
from numba_attn.cpu.factors import across
from numba_attn.cpu.jit import device, kernel
from numba_attn.cpu.narrow import INT8, STORED, bits_of, kind_of
from numba_attn.cpu.pointers import address, moved
from numba_attn.cpu.simd import I8, Value, Vectors
from numba_attn.cpu.workers import by_workers
from numba_attn.storage import BLOCKS, COARSEST, GROUP, MIDDLE, QUANTIZED, SHIFTS, TOGETHER, row_bytes

ROWS = 64  # of a task
SERIAL_SIZE = 1 << 15  # numbers that are rounded sooner than the threads are woken
MAGIC = 1.5 * 2.0**23  # added to smaller numbers, it leaves whole ones


def _quantize(v, x, D, out):
    """The bytes of a row of D numbers, which is filled up to whole TOGETHER."""
    (_of_8_bits if v.pointees["out"] == INT8 else _of_4_bits)(v, x, D, out)


def _of_8_bits(v: Vectors, x: Value, D: Value, out: Value) -> None:
    b, size = v.builder, v.mul_index(v.wholes(D, GROUP), GROUP)

    def look(d: Value, carried: list[Value]) -> list[Value]:
        a = v.absolute(v.load(x, v.mul_index(d, v.size)))
        return [v.maximum(a, carried[0]), v.fma(a, v.constant(0.0), carried[1])]

    top, check = v.loop(0, size, v.lanes, [v.constant(0.0)] * 2, look)
    scale = v.div(across(v, top, 1, v.maximum), v.constant(127.0))
    divisor, finite = _divisor(v, scale), v.equal(across(v, check, 1, v.add), v.constant(0.0))

    def steps(d: Value, _: list[Value]) -> list[Value]:
        n = _whole(v, v.div(v.load(x, v.mul_index(d, v.size)), divisor))
        n = v.select(finite, v.select(v.less(n, v.constant(127.0)), n, v.constant(127.0)), v.constant(0.0))
        n = v.maximum(n, v.constant(-127.0))
        v.store(b.fptosi(n, ir.VectorType(I8, v.lanes)), out, d)
        return []

    v.loop(0, size, v.lanes, [], steps)
    _store_scale(v, scale, finite, out, size)


def _of_4_bits(v: Vectors, x: Value, D: Value, out: Value) -> None:
    """A vector has a number for each block, and TOGETHER numbers are as many vectors."""
    v = Vectors(v.builder, v.dtype, BLOCKS)
    b, zero, groups, pieces = v.builder, v.constant(0.0), v.wholes(D, GROUP), v.wholes(D, TOGETHER)

    def load(piece: Value) -> list[Value]:
        first = v.mul_index(piece, TOGETHER)
        return [v.load(x, v.mul_index(v.add_index(first, i), v.size)) for i in range(0, TOGETHER, BLOCKS)]

    def needed(numbers: list[Value], k: int) -> Value:
        """What c would be: the largest n, 15, is to reach up to the largest number, and 0 to the smallest."""
        high = low = zero
        for number in numbers:
            high, low = v.maximum(number, high), _smaller(v, number, low)
        up, down = v.constant(1 / (30 - MIDDLE + k)), v.constant(1 / (MIDDLE - k))
        return v.maximum(v.mul(high, up), v.mul(v.sub(zero, low), down))

    def look(piece: Value, carried: list[Value]) -> list[Value]:
        numbers = load(piece)
        least = needed(numbers, 0)
        for k in range(1, SHIFTS):
            least = _smaller(v, needed(numbers, k), least)
        check = carried[1]
        for number in numbers:
            check = v.fma(number, zero, check)
        return [v.maximum(least, carried[0]), check]

    top, check = v.loop(0, pieces, 1, [zero, zero], look)
    scale = v.div(across(v, top, 1, v.maximum), v.constant(COARSEST))
    divisor, finite = _divisor(v, scale), v.equal(across(v, check, 1, v.add), zero)

    def piece(i: Value, _: list[Value]) -> list[Value]:
        relative = [v.select(finite, v.div(number, divisor), zero) for number in load(i)]
        best, codes, found = v.constant(np.inf), zero, [zero] * len(relative)
        for k in range(SHIFTS):
            c, middle = _whole(v, needed(relative, k)), v.constant(MIDDLE - k)
            c = _smaller(v, v.maximum(c, v.constant(1.0)), v.constant(COARSEST))
            inverse, error, steps = v.div(v.constant(1.0), c), None, []
            for number in relative:
                n = _whole(v, v.mul(v.add(v.mul(number, inverse), middle), v.constant(0.5)))
                n = _smaller(v, v.maximum(n, zero), v.constant(15.0))
                off = v.sub(v.mul(v.sub(v.add(n, n), middle), c), number)
                square = v.mul(off, off)
                error = square if error is None else v.add(error, square)
                steps.append(n)
            better = v.less(error, best)
            best = v.select(better, error, best)
            codes = v.select(better, v.add(v.mul(c, v.constant(8.0)), v.constant(k)), codes)
            found = [v.select(better, n, other) for n, other in zip(steps, found, strict=True)]
        halves = [b.fptoui(n, ir.VectorType(I8, BLOCKS)) for n in found]
        four = ir.Constant(halves[0].type, [4] * BLOCKS)
        for group in range(2):
            with b.if_then(b.icmp_signed("<", v.add_index(v.mul_index(i, 2), group), groups)):
                for half in range(2):
                    low, high = (halves[4 * group + half + upper] for upper in (0, 2))
                    at = v.add_index(v.mul_index(i, TOGETHER // 2), GROUP // 2 * group + BLOCKS * half)
                    v.store(b.or_(low, b.shl(high, four)), out, at)
        at = v.add_index(v.mul_index(groups, GROUP // 2), v.mul_index(i, BLOCKS))
        v.store(b.fptoui(codes, ir.VectorType(I8, BLOCKS)), out, at)
        return []

    v.loop(0, pieces, 1, [], piece)
    at = v.add_index(v.mul_index(groups, GROUP // 2), v.mul_index(pieces, BLOCKS))
    _store_scale(v, scale, finite, out, at)


def _whole(v: Vectors, x: Value) -> Value:
    return v.sub(v.add(x, v.constant(MAGIC)), v.constant(MAGIC))


def _smaller(v: Vectors, a: Value, b: Value) -> Value:
    return v.select(v.less(a, b), a, b)


def _divisor(v: Vectors, scale: Value) -> Value:
    return v.select(v.equal(scale, v.constant(0.0)), v.constant(1.0), scale)


def _store_scale(v: Vectors, scale: Value, finite: Value, out: Value, at: Value) -> None:
    scale = v.add(v.select(finite, scale, v.constant(np.nan)), v.constant(0.0))  # never -0.0
    v.store(v.builder.extract_element(scale, v.index(0)), out, at)


quantize = emits(_quantize)


@device
def fill(memory, D, columns):
    """Repeat elements of the same block, see `numba_attn.storage`, after which there are `columns`."""
    last = D // TOGETHER * TOGETHER
    period = max(BLOCKS, (D - last) // BLOCKS * BLOCKS)
    for d in range(D, columns):
        again = last + (d - last) % period
        memory[d] = memory[again] if again < D else 0


@device
def do_tasks(worker, memories, counters, x, scales, out, again):
    """Do tasks until there are none: some rows of one head each.  Scales are (heads, D), or empty.

    Rows are filled up with their elements again, or with zeros.
    """
    memory = memories[worker]
    (_, _, L, D), columns, helped = x.shape, memory.size, 0
    while True:
        b, h, first, helped = launch.take_rows(counters, worker, helped, x.shape, ROWS)
        if b < 0:
            break
        for i in range(first, min(first + ROWS, L)):
            here = moved(address(x), b * x.strides[0] + h * x.strides[1] + i * x.strides[2])
            pack.copy_rows(here, 0, x.strides[3], 1, D, columns, address(memory))
            if scales.size:
                for d in range(D):
                    memory[d] /= scales[h, d]
            if again:
                fill(memory, D, columns)
            to = moved(address(out), b * out.strides[0] + h * out.strides[1] + i * out.strides[2])
            quantize(address(memory), D, to)


do_all_tasks = by_workers(do_tasks)


@kernel
def convert(launcher, memories, counters, x, scales, out, again):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, x, scales, out, again)


# From Python ----------------------------------------------------------------------------------------------------------


def run(x: np.ndarray, numbers: str, scales: np.ndarray | None) -> np.ndarray:
    """Rows (B, H, L, D) as (B, H, L, row_bytes) of uint8; divided by scales of channels (H, 1, D) before, if given."""
    B, H, L, D = x.shape
    out = np.empty((B, H, L, row_bytes(numbers, D)), np.uint8)
    if not out.size:
        return out
    tasks, columns = B * H * -(-L // ROWS), -(-D // TOGETHER) * TOGETHER
    workers = min(threads.count(), tasks) if x.size > SERIAL_SIZE else 1
    channels = np.empty((0, 0), np.float32) if scales is None else scales[:, 0]
    kinds = kind_of(x.dtype), numbers
    start = launch.prepared(entry, kinds, workers, tasks, 50.0 * x.size, columns, np.dtype(np.float32))
    start(bits_of(x), channels, *((out.view(np.int8), 0) if numbers == "int8" else (out, 1)))
    return out


def signature(kind: str, numbers: str) -> tuple[types.Type, ...]:
    """Of `convert`, for a kind of element and what is made of it."""
    return launch.signature_of(
        types.float32,
        types.Array(STORED[kind], 4, "A", readonly=True, aligned=False),
        types.Array(types.float32, 2, "A", readonly=True),
        types.Array(STORED[numbers], 4, "C"),
        types.int64,
    )


entry = launch.entry(convert, signature)


def warmup() -> list[str]:
    """Compile the kernel for every kind of element, or load it from the cache; returns their names."""
    kinds = [(kind, numbers) for kind in ("f", "float16", "bfloat16") for numbers in QUANTIZED]
    for kind in kinds:
        entry(*kind)
    return [f"{__name__}, {kind} to {numbers}" for kind, numbers in kinds]
