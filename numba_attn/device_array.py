"""Arrays in the memory of a CUDA device, as a `Problem` has them: where numbers lie, never the numbers.

`DeviceArray` has what the checks of a call ask of a NumPy array (`shape`, `strides`, `dtype`, `flags`, `swapaxes`,
indexing), so that those are written once, and what a launcher needs besides:

    address     of the first element, an int that a kernel takes as a pointer
    strides     in bytes, as NumPy's
    device      number of the device, None if the array's owner does not tell
    stream      CUstream as an int, on which the contents are ready and results are expected; 1 is the legacy default
                stream, 2 that of the thread; None if the contents are ready on any, and results expected on the first
    owner       the caller's array, kept alive; of results, what the caller gets
    awaited     whether results have to be there when a call returns, as their owner's library knows of no stream
    empty       a method: a new contiguous array beside this one, allocated by the caller's own library

Views keep device, stream and owner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np


class Flags(NamedTuple):
    """Of NumPy's flags those that are asked for."""

    c_contiguous: bool
    writeable: bool


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """A view of an array on a CUDA device.

    >>> x = DeviceArray(4096, (2, 3, 5), (60, 20, 4), np.dtype(np.float32))
    >>> x[1].swapaxes(0, 1)
    DeviceArray(address=4156, shape=(5, 3), strides=(4, 20), dtype=float32, device=None)
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    device: int | None = None
    stream: int | None = 1
    writeable: bool = True
    owner: Any = None
    alive: Any = None  # what else must live as long as the memory is used
    allocate: Callable[[tuple[int, ...], np.dtype], DeviceArray] | None = None
    awaited: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def flags(self) -> Flags:
        expected, contiguous = self.itemsize, True
        for n, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            contiguous &= n == 1 or stride == expected
            expected *= n
        return Flags(contiguous or self.size == 0, self.writeable)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return (
            f"DeviceArray(address={self.address}, shape={self.shape}, strides={self.strides}, dtype={self.dtype}, "
            f"device={self.device})"
        )

    def swapaxes(self, one: int, other: int) -> DeviceArray:
        order = list(range(self.ndim))
        order[one], order[other] = order[other], order[one]
        shape, strides = (tuple(x[axis] for axis in order) for x in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)

    def __getitem__(self, index: Any) -> DeviceArray:
        """By integers, slices, None and an ellipsis; without axes left it is still an array."""
        index = index if isinstance(index, tuple) else (index,)
        rest = slice(None)
        before, after = index, ()
        if Ellipsis in index:
            at = index.index(Ellipsis)
            before, after = index[:at], index[at + 1 :]
        given = sum(i is not None for i in (*before, *after))
        if given > self.ndim:
            raise IndexError(f"too many indices, {given} for shape {self.shape}")
        address, shape, strides = self.address, [], []
        axes = iter(zip(self.shape, self.strides, strict=True))
        for i in (*before, *[rest] * (self.ndim - given), *after):
            if i is None:
                shape.append(1)
                strides.append(0)
                continue
            n, stride = next(axes)
            if isinstance(i, slice):
                places = range(n)[i]
                address += (places.start if places else 0) * stride
                shape.append(len(places))
                strides.append(stride * places.step)
            else:
                address += range(n)[i] * stride
        return replace(self, address=address, shape=tuple(shape), strides=tuple(strides))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """A new array on the same device, of the same library as the owner."""
        if self.allocate is None:
            raise NotImplementedError("out must be given, as no library is known that makes arrays like query")
        return self.allocate(shape, dtype)

    def places(self) -> np.ndarray:
        """The same view of the same addresses, for NumPy to reckon with: it must not be read."""
        return np.asarray(_Places(self))


class _Places:
    def __init__(self, x: DeviceArray) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{x.itemsize}",
            "shape": x.shape,
            "strides": x.strides,
            "data": (x.address, True),
        }
