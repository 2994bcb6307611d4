"""Numba's CUDA simulator in the place of a device: threads of Python run the kernels' own source, on NumPy arrays.

It is for tests, where `NUMBA_ENABLE_CUDASIM=1` is set before Numba is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from numba_attn.cuda.arguments import Numbers, Reals


def enabled() -> bool:
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


class Machine:
    """The simulator with the interface of `launch.Machine`; a buffer is a NumPy array."""

    compute_capability = None  # it has no instructions of any

    @contextmanager
    def active(self) -> Iterator[Machine]:
        yield self

    def upload(self, x: np.ndarray) -> np.ndarray:
        return x.copy()

    constant = upload

    def empty(self, count: int, dtype: type[np.generic]) -> np.ndarray:
        return np.empty(count, dtype)

    def download(self, buffer: np.ndarray, into: np.ndarray) -> None:
        into[...] = buffer

    def function(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A user's function as kernels take it."""
        return function

    def launch(
        self,
        make: Callable[..., Any],
        configuration: tuple[Any, ...],
        threads: int,
        blocks: int,
        buffers: list[np.ndarray],
        numbers: Numbers,
        reals: Reals,
    ) -> None:
        cuda = _simulated()
        kernel = make(_Inside(threads), None, *configuration)

        def entry() -> None:
            kernel(*buffers, numbers, reals)

        # The simulator puts what a thread sees as `cuda` into the globals of the function that it runs.
        cuda.jit(entry)[blocks, threads]()


def _simulated() -> Any:
    """Numba's module, which must be a global of this one while a kernel runs."""
    from numba import cuda

    globals()["cuda"] = cuda
    return cuda


class _Inside:
    """The module `cuda` as a kernel sees it: that of the thread, with device functions that are plain Python."""

    def __init__(self, threads: int) -> None:
        self.shared = _Shared(threads)

    def __getattr__(self, name: str) -> Any:
        return getattr(globals()["cuda"], name)

    @staticmethod
    def jit(**options: Any) -> Callable[[Any], Any]:
        return lambda function: function


class _Shared:
    """Shared memory: as blocks run one after the other, an array for each line that asks for one."""

    def __init__(self, threads: int) -> None:
        self._dynamic = np.zeros(threads, np.uint32)
        self._arrays: dict[int, np.ndarray] = {}

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> np.ndarray:
        if shape == 0:
            return self._dynamic.view(dtype)
        line = sys._getframe(1).f_lineno
        return self._arrays.setdefault(line, np.full(shape, np.nan, dtype))
