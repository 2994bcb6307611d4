"""What a call of a kernel needs from Python: working memory, counters, tables of where sequences begin."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from numba_attn import threads
from numba_attn.cpu.jit import Compiled, compiled

MOST_KEPT = 1 << 26  # bytes of working memory that a thread keeps between calls


@functools.lru_cache(maxsize=64)
def batch_offsets(batch: tuple[int, ...], *strides: tuple[int, ...]) -> np.ndarray:
    """(B, arrays) int64: how many bytes after the first sequence of each array the others start."""
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


_kept = threading.local()


def working_memory(workers: int, size: int, dtype: np.dtype) -> np.ndarray:
    """(workers, size) of uninitialised memory, aligned to cache lines; each Python thread keeps its last one."""
    wanted = workers, size, dtype.char
    if getattr(_kept, "shape", None) == wanted:
        return _kept.memory
    length = workers * size * dtype.itemsize
    buffer = np.empty(length + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    memory = buffer[start : start + length].view(dtype).reshape(workers, size)
    if length <= MOST_KEPT:
        _kept.shape, _kept.memory = wanted, memory
    return memory


def counters(workers: int) -> np.ndarray:
    """How many tasks of each worker's have been taken, each on a cache line of its own."""
    return np.zeros((workers, 8), np.int64)


def entries(
    kernel: Any, together: Any, signature: Callable[..., tuple[types.Type, ...]]
) -> tuple[Callable[..., Compiled], Callable[..., Compiled]]:
    """The serial and the parallel entry of a kernel: functions of what its signature depends on, which compile it.

    The first argument of the kernel is the memory of one worker; of `together`, the address of the kernel's machine
    code, and the memory of all workers instead.
    """

    @functools.cache
    def serial(*kinds: Any) -> Compiled:
        return compiled(kernel, signature(*kinds))

    @functools.cache
    def parallel(*kinds: Any) -> Compiled:
        memory, _, *rest = signature(*kinds)
        code = types.Array(types.intp, 1, "C")
        return compiled(together, (code, types.Array(memory.dtype, 2, "C"), *rest))

    return serial, parallel


def run(
    serial: Callable[..., Compiled],
    parallel: Callable[..., Compiled],
    kinds: tuple[str, ...],
    workers: int,
    size: int,
    dtype: np.dtype,
    *arguments: Any,
) -> None:
    """Call a kernel, of which there are a serial and a parallel entry for element types `kinds`, on as many workers.

    Each has `size` elements of memory.  Where another thread has the workers, the caller's does it all.
    """
    if workers > 1:
        with threads.pool() as mine:
            if mine:
                memory = working_memory(workers, size, dtype)
                code = serial(*kinds).code
                parallel(*kinds).call(code, memory, counters(workers), *arguments)
                return
    serial(*kinds).call(working_memory(1, size, dtype)[0], 0, counters(1), *arguments)
