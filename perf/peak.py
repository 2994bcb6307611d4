"""What the machine can do at most, the yardstick of every kernel: multiply-add rate and read bandwidth of all threads.

The instructions are those that the kernels are made of, `numba_attn.cpu.simd`, so that the peak is that of the vectors
which they may use.
"""

from __future__ import annotations

import time
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


def _multiply_add(v: Vectors, memory: Any, turns: Any) -> None:
    """The sums start with what is in memory, and end there."""
    sums = [v.load(memory, i * v.bytes) for i in range(ACCUMULATORS)]
    a, b = (v.load(memory, i * v.bytes) for i in (ACCUMULATORS, ACCUMULATORS + 1))

    def turn(_: Any, sums: list[Any]) -> list[Any]:
        for _ in range(UNROLLED):
            sums = [v.fma(a, b, c) for c in sums]
        return sums

    for i, total in enumerate(v.loop(0, turns, 1, sums, turn)):
        v.store(total, memory, i * v.bytes)


multiply_add = emits(_multiply_add)


@njit(parallel=True, nogil=True)
def _multiply_add_on_all(memory, turns):  # type: ignore[no-untyped-def]
    for thread in prange(memory.shape[0]):
        multiply_add(address(memory[thread]), turns)


@njit(parallel=True, nogil=True)
def _sum_on_all(words, totals):  # type: ignore[no-untyped-def]
    for row in prange(words.shape[0]):
        total = 0
        for word in words[row]:
            total += word
        totals[row] = total


class MultiplyAdd:
    """The peak of one float type; the length of a measurement is chosen once, on making it."""

    def __init__(self, dtype: str) -> None:
        lanes = target.VECTOR_BYTES // np.dtype(dtype).itemsize
        threads = numba.get_num_threads()
        self._memory = np.full((threads, (ACCUMULATORS + 2) * lanes), 0.5, dtype)
        self._flop = 2 * threads * ACCUMULATORS * UNROLLED * lanes  # of one turn
        self._turns = 1000
        self._run()  # compiles
        while (seconds := self._run()) < TURN:
            self._turns = round(self._turns * min(10, 1.2 * TURN / seconds) + 1)

    def _run(self) -> float:
        start = time.perf_counter()
        _multiply_add_on_all(self._memory, self._turns)
        return time.perf_counter() - start

    def gflops(self) -> float:
        """One measurement, in GFLOP/s."""
        return self._flop * self._turns / self._run() / 1e9


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
