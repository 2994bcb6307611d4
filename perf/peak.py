"""What the machine can do at most, the yardstick of every kernel: multiply-add rate and read bandwidth of all threads.

The instructions are those that the kernels are made of, `numba_attn.cpu.simd`, so that the peak is that of the vectors
which they may use.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from numba_attn.cpu import target
from numba_attn.cpu.simd import Vectors, address, emits

# Independent sums: more than the latency of a multiply-add times the two that a processor starts in a cycle, and few
# enough for the 16 registers of AVX2.
ACCUMULATORS = 10
UNROLLED = 4  # times that each sum is added to in one turn of the loop
TURN = 0.01  # seconds of one measurement
READ_BYTES = 256_000_000  # far beyond any cache


def _multiply_add(v: Vectors, memory: Any, turns: Any, *, dot: bool = False) -> None:
    """The sums start with what is in memory, and end there."""
    operation = v.dot if dot else v.fma
    sums = [v.load(memory, i * v.bytes) for i in range(ACCUMULATORS)]
    a, b = (v.load(memory, i * v.bytes) for i in (ACCUMULATORS, ACCUMULATORS + 1))

    def turn(_: Any, sums: list[Any]) -> list[Any]:
        for _ in range(UNROLLED):
            sums = [operation(a, b, c) for c in sums]
        return sums

    for i, total in enumerate(v.loop(0, turns, 1, sums, turn)):
        v.store(total, memory, i * v.bytes)


def _on_all(operation: Any) -> Callable[..., None]:
    @njit(parallel=True, nogil=True)
    def on_all(memory, turns):  # type: ignore[no-untyped-def]
        for thread in prange(memory.shape[0]):
            operation(address(memory[thread]), turns)

    return on_all


_multiply_add_on_all = _on_all(emits(_multiply_add))
_dot_on_all = _on_all(emits(functools.partial(_multiply_add, dot=True)))


@njit(parallel=True, nogil=True)
def _sum_on_all(words, totals):  # type: ignore[no-untyped-def]
    for row in prange(words.shape[0]):
        total = 0
        for word in words[row]:
            total += word
        totals[row] = total


class MultiplyAdd:
    """The peak of one float type; the length of a measurement is chosen once, on making it.

    Of bfloat16, that of the instruction that adds two products to a float32 sum: needs `target.HAS_BFLOAT16_DOT`.
    """

    def __init__(self, dtype: str) -> None:
        self._on_all, products = _multiply_add_on_all, 1
        if dtype == "bfloat16":
            self._on_all, products, dtype = _dot_on_all, 2, "float32"
        lanes = target.VECTOR_BYTES // np.dtype(dtype).itemsize
        threads = numba.get_num_threads()
        self._memory = np.full((threads, (ACCUMULATORS + 2) * lanes), 0.5, dtype)
        self._flop = 2 * products * threads * ACCUMULATORS * UNROLLED * lanes  # of one turn
        self._turns = 1000
        self._run()  # compiles
        while (seconds := self._run()) < TURN:
            self._turns = round(self._turns * min(10, 1.2 * TURN / seconds) + 1)

    def _run(self) -> float:
        start = time.perf_counter()
        self._on_all(self._memory, self._turns)
        return time.perf_counter() - start

    def gflops(self) -> float:
        """One measurement, in GFLOP/s."""
        return self._flop * self._turns / self._run() / 1e9


def measures(dtype: str) -> list[MultiplyAdd]:
    """What the products of a type can be made of: the fastest is its peak."""
    types = {"float16": ["float32"], "bfloat16": ["float32", *(["bfloat16"] if target.HAS_BFLOAT16_DOT else [])]}
    return [MultiplyAdd(one) for one in types.get(dtype, [dtype])]


def read_bandwidth() -> float:
    """GB/s at which all threads together add up an array: the best of five."""
    rows = 16 * numba.get_num_threads()
    words = np.ones((rows, READ_BYTES // 8 // rows), np.int64)
    totals = np.empty(rows, np.int64)

    def seconds() -> float:
        start = time.perf_counter()
        _sum_on_all(words, totals)
        return time.perf_counter() - start

    seconds()
    return float(words.nbytes / min(seconds() for _ in range(5)) / 1e9)
