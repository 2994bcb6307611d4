"""What a call of a kernel needs from Python: working memory, slices of its tasks, tables of where sequences begin."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numba import types

from numba_attn import threads
from numba_attn.cpu.jit import Compiled, compiled, device
from numba_attn.cpu.pointers import fetch_add
from numba_attn.cpu.workers import launcher
from numba_attn.kept import kept
from numba_attn.memory import aligned

SERIAL_WORK = 1 << 20  # multiply-adds that are done sooner than the threads are woken
MOST_KEPT = 1 << 26  # bytes of working memory that a thread keeps between calls
# A long call is made in slices, as signals, Ctrl-C for one, are only seen between them: a first one of so many
# multiply-adds for each worker, 0.2 s with AVX-512, and then, as that has taken long or not, slices of so many seconds.
FIRST_SLICE = 1e10
SLICE_SECONDS = 0.5


@kept
def batch_offsets(batch: tuple[int, ...], *strides: tuple[int, ...]) -> np.ndarray:
    """(B, arrays) int64, read-only: how many bytes after the first sequence of each array the others start."""
    offsets = np.zeros((1, len(strides)), np.int64)
    for axis, length in enumerate(batch):
        steps = np.array([s[axis] for s in strides])
        offsets = (offsets[:, None] + np.arange(length)[:, None] * steps).reshape(-1, len(strides))
    return offsets


def mask_strides(mask: np.ndarray | None, batch: tuple[int, ...]) -> tuple[int, ...]:
    """A mask's strides along the batch axes, 0 where it is broadcast."""
    if mask is None:
        return (0,) * len(batch)
    return tuple(s if n > 1 else 0 for s, n in zip(mask.strides, mask.shape[: len(batch)], strict=False))


class _Kept(threading.local):
    """Memory that a Python thread keeps, and how many bytes of it: a model calls a few kernels in turn."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, int, str], np.ndarray] = {}
        self.bytes = 0


_kept = _Kept()


class working_memory:
    """(workers, size) of uninitialised memory, aligned to cache lines, for the caller alone inside the `with` block.

    Each Python thread keeps what it has had last.  Meanwhile that is lent: what the block itself asks for, or a call of
    a signal handler or a finaliser in the middle of it, is other memory.
    """

    # Not a generator: see `threads.do_together`.
    __slots__ = ("_memory", "_wanted")

    def __init__(self, workers: int, size: int, dtype: np.dtype) -> None:
        self._wanted = workers, size, dtype.char

    def __enter__(self) -> np.ndarray:
        memory = _kept.memory.pop(self._wanted, None)
        if memory is None:
            workers, size, char = self._wanted
            memory = aligned((workers, size), np.dtype(char))
        else:
            _kept.bytes -= memory.nbytes
        self._memory = memory
        return memory

    def __exit__(self, *exception: object) -> None:
        length = self._memory.nbytes
        if length > MOST_KEPT or self._wanted in _kept.memory:
            return
        if _kept.bytes + length > MOST_KEPT:
            _kept.memory.clear()
            _kept.bytes = 0
        _kept.memory[self._wanted] = self._memory
        _kept.bytes += length


def rows_times_keys(sequences: Any) -> float:
    """Of the sequences that are wanted, see `score.Sequences`."""
    intervals, numbers = sequences.intervals, sequences.numbers
    if len(numbers) == 1:  # as arrays, it would take longer than a small problem
        _, rows, keys = intervals[numbers[0, 0]].tolist()
        return float(rows) * keys
    _, rows, keys = intervals[numbers[:, 0]].T
    return float(np.dot(rows.astype(np.float64), keys))


def workers_for(threads_used: int, tasks: int, operations: float, serial_work: int = SERIAL_WORK) -> int:
    """How many of the threads are worth waking."""
    return min(threads_used, tasks) if operations > serial_work else 1


@device
def take(counters, worker, helped, tasks):
    """The next of a kernel's tasks for a worker, -1 if there is none in this slice; and how many others it has helped.

    Each worker has a range of tasks, so that few heads pass through its caches, and helps the others when it is done.
    """
    workers = counters.shape[0]
    while helped < workers:
        owner = (worker + helped) % workers
        number = fetch_add(counters, owner)
        task = tasks * owner // workers + number
        if number < counters[owner, 1] and task < tasks * (owner + 1) // workers:
            return task, helped
        helped += 1
    return -1, helped


@device
def take_rows(counters, worker, helped, shape, rows):
    """The sequence, the head and the first row of the next task, of so many rows of an array (B, H, L, ...), -1 if
    there is none; and how many others the worker has helped.
    """
    B, H, L, _ = shape
    per_head = (L + rows - 1) // rows
    task, helped = take(counters, worker, helped, B * H * per_head)
    return task // per_head // H, task // per_head % H, task % per_head * rows, helped


def slices(workers: int, tasks: int, operations: float) -> Iterable[np.ndarray]:
    """Counters for one call of a kernel after the other, until all of its tasks are done, of so many multiply-adds.

    They are (workers, 8), a cache line each: how many tasks of a worker's have been taken, and how many may be.
    """
    if operations <= FIRST_SLICE * workers:
        return (_all_at_once(workers, -(-tasks // workers)).copy(),)
    return _one_after_the_other(workers, tasks, operations)


@functools.lru_cache(maxsize=64)
def _all_at_once(workers: int, each: int) -> np.ndarray:
    counters = np.zeros((workers, 8), np.int64)
    counters[:, 1] = each
    return counters


def _one_after_the_other(workers: int, tasks: int, operations: float) -> Iterator[np.ndarray]:
    counters = np.zeros((workers, 8), np.int64)
    each, done = -(-tasks // workers), 0
    at_once = max(1, int(tasks * FIRST_SLICE / operations))
    while done < each:
        counters[:, 0], counters[:, 1] = done, done + at_once
        start = time.perf_counter()
        yield counters
        done += at_once
        seconds = time.perf_counter() - start
        at_once = max(1, int(at_once * min(8.0, SLICE_SECONDS / max(seconds, 1e-6))))


def signature_of(memory: types.Type, *others: types.Type) -> tuple[types.Type, ...]:
    """Of a kernel whose workers have memory of elements of that type, and which has other arguments.

    The first of all are the address of what launches workers, 0 if there is one, their memories, and counters of their
    tasks.
    """
    return (types.intp, types.Array(memory, 2, "C"), types.Array(types.int64, 2, "C"), *others)


def entry(kernel: Any, signature: Callable[..., tuple[types.Type, ...]]) -> Callable[..., Compiled]:
    """A function that compiles a kernel, of what its signature, see `signature_of`, depends on."""

    @functools.cache
    def of_kinds(*kinds: Any) -> Compiled:
        return compiled(kernel, signature(*kinds))

    return of_kinds


def prepared(
    entry: Callable[..., Compiled],
    kinds: tuple[Any, ...],
    workers: int,
    tasks: int,
    operations: float,
    size: int,
    dtype: np.dtype,
) -> Callable[..., None]:
    """A kernel for element types `kinds`, to be given arguments.

    It has so many tasks, of so many multiply-adds together, for as many workers.  Each worker has `size` elements of
    memory.  Where another thread has the workers, the caller's does it all.
    """
    call, address = entry(*kinds).call, launcher() if workers > 1 else 0

    def run(*arguments: Any) -> None:
        def by(workers: int) -> None:
            with working_memory(workers, size, dtype) as memories:
                for counters in slices(workers, tasks, operations):
                    call(address, memories, counters, *arguments)

        if not threads.do_together(workers, lambda: by(workers)):
            by(1)

    return run
