"""What the machine can do at most, the yardstick of every kernel: multiply-add rate and read bandwidth of all threads.

The instructions are those that the kernels are made of, `numba_attn.cpu.simd`, so that the peak is that of the vectors
which they may use.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types

from numba_attn.cpu import amx, target
from numba_attn.cpu.emits import emits
from numba_attn.cpu.pointers import address
from numba_attn.cpu.simd import Vectors

# Independent sums: more than the latency of a multiply-add times the two that a processor starts in a cycle, and few
# enough for the 16 registers of AVX2.
ACCUMULATORS = 10
UNROLLED = 4  # times that each sum is added to in one turn of the loop
TURN = 0.01  # seconds of one measurement
SUMS = 8  # of vectors that are read: enough to have as many loads under way as a processor can
READ_BYTES = 256_000_000  # far beyond any cache


def _multiply_add(v: Vectors, memory: Any, turns: Any, *, dot: bool = False) -> None:
    """The sums start with what is in memory, and end there; `dot` for products of pairs of bfloat16 numbers."""
    operation = v.dot if dot else v.fma
    sums = [v.load(memory, i * v.bytes) for i in range(ACCUMULATORS)]
    a, b = (v.load(memory, i * v.bytes) for i in (ACCUMULATORS, ACCUMULATORS + 1))

    def turn(_: Any, sums: list[Any]) -> list[Any]:
        for _ in range(UNROLLED):
            sums = [operation(a, b, c) for c in sums]
        return sums

    for i, total in enumerate(v.loop(0, turns, 1, sums, turn)):
        v.store(total, memory, i * v.bytes)


def _multiply_tiles(v: Vectors, memory: Any, turns: Any) -> None:
    """The same on the tile registers of AMX, of which there are enough for four sums."""

    def emit(text: str, *values: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [x.type for x in values])
        v.builder.asm(kind, text, ",".join(["r"] * len(values)), values, True)

    for register in (*amx.SUMS, *amx.LEFT, *amx.RIGHT):
        emit(f"tileloadd ($0,$1,1), %tmm{register}", memory, v.index(amx.ROW_BYTES))

    def turn(_: Any, none: list[Any]) -> list[Any]:
        for _ in range(UNROLLED):
            for i, register in enumerate(amx.SUMS):
                emit(f"tdpbf16ps %tmm{amx.RIGHT[i % 2]}, %tmm{amx.LEFT[i // 2]}, %tmm{register}")
        return none

    v.loop(0, turns, 1, [], turn)


multiply_tiles = emits(_multiply_tiles)


@njit(parallel=True, nogil=True)
def _multiply_tiles_on_all(memory, turns):  # type: ignore[no-untyped-def]
    for thread in prange(memory.shape[0]):
        at = address(memory[thread])
        amx.configure(at)
        multiply_tiles(at, turns)
        amx.release(at)


def _on_all(operation: Any) -> Callable[..., None]:
    @njit(parallel=True, nogil=True)
    def on_all(memory, turns):  # type: ignore[no-untyped-def]
        for thread in prange(memory.shape[0]):
            operation(address(memory[thread]), turns)

    return on_all


_multiply_add_on_all = _on_all(emits(_multiply_add))
_dot_on_all = _on_all(emits(functools.partial(_multiply_add, dot=True)))


def _sum(v: Vectors, words: Any, vectors: Any) -> Any:
    """Some sum of `vectors` vectors, a multiple of SUMS: of integers, as those are never denormal."""
    b = v.builder

    def turn(i: Any, sums: list[Any]) -> list[Any]:
        at = v.mul_index(i, v.bytes)
        return [b.add(total, v.load_pairs(words, v.add_index(at, j * v.bytes))) for j, total in enumerate(sums)]

    sums = v.loop(0, vectors, SUMS, [ir.Constant(v.bits, [0] * v.lanes)] * SUMS, turn)
    return b.extract_element(functools.reduce(b.add, sums), v.index(0))


_sum_of = emits(_sum, returns=types.int32)


@njit(parallel=True, nogil=True)
def _sum_on_all(rows, vectors, totals):  # type: ignore[no-untyped-def]
    for row in prange(rows.shape[0]):
        totals[row] = _sum_of(address(rows[row]), vectors)


class MultiplyAdd:
    """The peak of one kind; the length of a measurement is chosen once, on making it.

    The kind is a float type, or "dot" or "amx", for which see `target.BFLOAT16`.
    """

    def __init__(self, kind: str) -> None:
        dtype = np.dtype("float32" if kind in ("dot", "amx") else kind)
        lanes = target.VECTOR_BYTES // dtype.itemsize
        vectors = 2 * ACCUMULATORS * lanes  # FLOP of one step
        self._on_all, flop = {
            "dot": (_dot_on_all, 2 * vectors),
            "amx": (_multiply_tiles_on_all, len(amx.SUMS) * 2 * amx.ROWS * amx.ROWS * amx.NUMBERS),
        }.get(kind, (_multiply_add_on_all, vectors))
        threads = numba.get_num_threads()
        self._memory = np.full((threads, 16 * max(amx.ROWS, lanes)), 0.5, dtype)
        self._flop = threads * UNROLLED * flop  # of one turn
        self._turns = 1000
        self._run(1)  # compiles
        numba.set_num_threads(1)  # on a busy machine, waiting for another one would pass for work
        while (seconds := self._run(1)) < TURN:
            self._turns = round(self._turns * min(10, 1.2 * TURN / seconds) + 1)
        numba.set_num_threads(threads)

    def _run(self, rows: int | None = None) -> float:
        start = time.perf_counter()
        self._on_all(self._memory[:rows], self._turns)
        return time.perf_counter() - start

    def gflops(self) -> float:
        """One measurement, in GFLOP/s."""
        return self._flop * self._turns / self._run() / 1e9


def measures(dtype: str) -> list[MultiplyAdd]:
    """What the products of a type can be made by: the fastest is its peak."""
    bfloat16 = ["float32", *([target.BFLOAT16] if target.BFLOAT16 != "widened" else [])]
    return [MultiplyAdd(kind) for kind in {"float16": ["float32"], "bfloat16": bfloat16}.get(dtype, [dtype])]


class Reading:
    """All threads together add up arrays, contiguous ones, whatever numbers they hold: all but a few bytes of them."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        count = 16 * numba.get_num_threads()
        self._vectors = [x.nbytes // (count * SUMS * target.VECTOR_BYTES) * SUMS for x in arrays]
        self._rows = [
            x.reshape(-1).view(np.uint8)[: count * vectors * target.VECTOR_BYTES].reshape(count, -1)
            for x, vectors in zip(arrays, self._vectors, strict=True)
        ]
        self._totals = np.empty(count, np.int32)
        self.bytes = sum(rows.nbytes for rows in self._rows)
        self()  # compiles

    def __call__(self) -> None:
        for rows, vectors in zip(self._rows, self._vectors, strict=True):
            _sum_on_all(rows, vectors, self._totals)


def read_bandwidth() -> float:
    """GB/s at which all threads together add up an array: the best of five."""
    reading = Reading([np.ones(READ_BYTES, np.uint8)])

    def seconds() -> float:
        start = time.perf_counter()
        reading()
        return time.perf_counter() - start

    return float(reading.bytes / min(seconds() for _ in range(5)) / 1e9)
