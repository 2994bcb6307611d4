"""Arrays of a problem on the machine that computes it: NumPy's are copied there, a device's stay where they are."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from numba_attn import checks
from numba_attn.cuda.arguments import STORED

STATISTICS = ("lse", "max_score", "entropy", "key_weight")
ARRAYS = ("query", "key", "value", "mask", "out", *STATISTICS)
"""Those of a problem, in the order in which kernels take them."""


class Placed(NamedTuple):
    """An array on a machine."""

    buffer: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, 0 along axes of length 1
    first: int  # where in the buffer the element is whose indices are all 0

    def starts(self, batch: tuple[int, ...]) -> np.ndarray:
        """Where each sequence starts; the first axes are those of the batch, or 1."""
        start = np.full(batch, self.first)
        for axis, n in enumerate(batch):
            start += (np.arange(n) * self.strides[axis]).reshape(-1, *(1,) * (len(batch) - axis - 1))
        return start.reshape(-1)


@functools.cache
def kind_of(dtype: np.dtype) -> str:
    """The name of `arguments.STORED` of a dtype."""
    return "bfloat16" if checks.is_bfloat16(dtype) else dtype.name


def operand(machine: Any, name: str, x: Any) -> Placed:
    """An array to read, the argument `name` of the call."""
    if not isinstance(x, np.ndarray):
        return _on_device(machine, name, x)
    # Each number once, however often it is broadcast.
    numbers = np.ascontiguousarray(x[tuple(slice(1) if s == 0 else slice(None) for s in x.strides)])
    strides = np.broadcast_to(numbers, x.shape).strides
    return Placed(machine.upload(_bits(numbers)), x.shape, _elements(x.shape, strides, x.itemsize), 0)


def result(machine: Any, name: str, x: Any) -> Placed:
    """An array to write; what is written for one of NumPy comes there by `fetch`."""
    if not isinstance(x, np.ndarray):
        return _on_device(machine, name, x)
    strides = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    return Placed(machine.empty(x.size, STORED[kind_of(x.dtype)]), x.shape, _elements(x.shape, strides, 1), 0)


def fetch(machine: Any, placed: Placed, into: Any) -> None:
    """Bring a result where the caller has it."""
    if isinstance(into, np.ndarray) and into.size:
        host = np.empty(into.shape, into.dtype)
        machine.download(placed.buffer, _bits(host))
        into[...] = host


def _on_device(machine: Any, name: str, x: Any) -> Placed:
    used = [s if n > 1 else 0 for n, s in zip(x.shape, x.strides, strict=True)]
    if x.address % x.itemsize or any(s % x.itemsize for s in used):
        raise NotImplementedError(
            f"backend 'cuda' needs elements of {x.itemsize} bytes at multiples of that, "
            f"got {name} at {x.address} with strides {x.strides}"
        )
    behind = sum(s * (n - 1) for n, s in zip(x.shape, used, strict=True) if s < 0)
    buffer = machine.buffer(name, x.address, behind, STORED[kind_of(x.dtype)], x.stream)
    return Placed(buffer, x.shape, _elements(x.shape, used, x.itemsize), -behind // x.itemsize)


def _elements(shape: tuple[int, ...], strides: Any, itemsize: int) -> tuple[int, ...]:
    return tuple(s // itemsize if n > 1 else 0 for n, s in zip(shape, strides, strict=True))


def _bits(x: np.ndarray) -> np.ndarray:
    """A contiguous array as kernels take it, flat, and not empty."""
    stored = STORED[kind_of(x.dtype)]
    return x.reshape(-1).view(stored) if x.size else np.zeros(1, stored)
