"""Runs the tensor-core kernels without a GPU: their own Python source, block by block.

Every value that differs from thread to thread is a NumPy array over the threads of a block, and each instruction of
`numba_attn.cuda.ptx` is a model of it in NumPy.  So control flow has to be the same for all threads of a block.  What
is wrong is made to show:

* shared memory, and registers that were never written, begin as NaN; so does the place that a copy is on its way to;
* copies arrive when they are waited for;
* a warp that reads or writes in shared memory what another has written, or writes what another has read, without a
  barrier between them, is an error, as is any access to global memory outside the arrays given;
* accesses to shared memory that take more than one turn, because of banks, are counted if that is asked for.

It cannot show what lanes of one warp do to each other, nor how fast anything is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from numba_attn.cuda.tensorcore import Launch

F32 = np.float32
_QUAD = np.arange(32)


class Memory:
    """Global memory: arrays at addresses of its own, as far from multiples of 256 as where they came from."""

    def __init__(self, size: int = 1 << 26):
        self.bytes, self.readable = np.zeros(size, np.uint8), np.zeros(size, bool)
        self._end = 4096
        self._places: list[tuple[np.ndarray, int]] = []

    def address(self, x: np.ndarray) -> int:
        """Where the first element of an array is, which is copied there unless it is there."""
        for known, place in self._places:
            if known is x:
                return place
        low, high = np.lib.array_utils.byte_bounds(x)
        start = (self._end + 255) // 256 * 256 + low % 256
        whole = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * (high - low)).from_address(low))
        self.bytes[start : start + high - low] = whole
        self._view(self.readable, x, start, low)[...] = True
        self._end = start + high - low + 512
        self._places.append((x, start + x.__array_interface__["data"][0] - low))
        return self._places[-1][1]

    def _view(self, flags: np.ndarray, x: np.ndarray, start: int, low: int) -> np.ndarray:
        first = start + x.__array_interface__["data"][0] - low
        shape, strides = (*x.shape, x.itemsize), (*x.strides, 1)
        return np.lib.stride_tricks.as_strided(flags[first:], shape, strides)

    def scratch(self, size: int) -> int:
        start = (self._end + 255) // 256 * 256
        self.bytes[start : start + size] = 0xFF
        self.readable[start : start + size] = True
        self._end = start + size + 512
        return start

    def copy_back(self, x: np.ndarray) -> None:
        shape, strides = (*x.shape, x.itemsize), (*x.strides, 1)
        found = np.lib.stride_tricks.as_strided(self.bytes[self.address(x) :], shape, strides)
        x[...] = found.copy().view(x.dtype)[..., 0]

    def at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices of the bytes of elements, (n, size)."""
        index = addresses[:, None] + np.arange(size)
        assert (index >= 0).all() and self.readable[index].all(), "an access outside the arrays"
        assert (addresses % size == 0).all(), f"an access of {size} bytes that is not aligned"
        return index


class Block:
    """The state of the block of threads that is running."""

    def __init__(self, launch: Launch, counts: Counter[str] | None):
        self.threads, self.counts = launch.block[0], counts
        self.warps = np.arange(self.threads)[:, None] // 32
        words = launch.shared_bytes // 4
        self.shared = np.full(words, 0xFFFFFFFF, np.uint32)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # words, data, warps
        self.groups: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
        # Of every word: between which barriers it was last written and read, and by which warp (-1: several).
        self.epoch = 1
        self.written, self.writer = np.zeros(words, np.int64), np.zeros(words, np.int64)
        self.read, self.reader = np.zeros(words, np.int64), np.zeros(words, np.int64)

    def lanes(self, x: Any, dtype: Any) -> np.ndarray:
        if not isinstance(x, np.ndarray) or not x.shape:
            x = np.full(self.threads, x)
        return x.astype(dtype, copy=False)

    def words(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Numbers of the words at addresses in shared memory, (n, size / 4)."""
        first, inside = addresses // 4, (addresses | (4 * len(self.shared) - size - addresses)) >= 0
        assert (addresses & (size - 1)).max(initial=0) == 0, "shared memory is not aligned"
        assert inside.all(), "outside shared memory"
        return first[:, None] + np.arange(size // 4)

    def note_read(self, words: np.ndarray, warps: np.ndarray) -> None:
        foreign = (self.written[words] == self.epoch) & (self.writer[words] != warps)
        assert not foreign.any(), "read without a barrier"
        several = (self.read[words] == self.epoch) & (self.reader[words] != warps)
        self.reader[words] = warps
        several |= self.reader[words] != warps
        self.reader[words[several]] = -1
        self.read[words] = self.epoch

    def note_write(self, words: np.ndarray, warps: np.ndarray) -> None:
        for epoch, owner in ((self.written, self.writer), (self.read, self.reader)):
            foreign = (epoch[words] == self.epoch) & (owner[words] != warps)
            assert not foreign.any(), "written without a barrier"
        self.written[words], self.writer[words] = self.epoch, warps

    def count_turns(self, name: str, words: np.ndarray) -> None:
        """Of accesses that the hardware makes 32 words at a time: whether some are different words of one bank."""
        if self.counts is None:
            return
        flat = words.reshape(-1)
        together = np.sort(np.resize(flat, (-(-len(flat) // 32), 32)), axis=1)
        banks = np.where(np.diff(together, axis=1, prepend=-1) == 0, -1, together % 32)  # a word once
        banks = np.sort(banks, axis=1)
        twice = (np.diff(banks, axis=1) == 0) & (banks[:, 1:] >= 0)
        self.counts[f"{name} conflicts"] += int(twice.any(axis=1).sum())
        self.counts[name] += 1


class _Cast:
    """A type of Numba: rounds numbers to it, and names it for arrays."""

    def __init__(self, dtype: Any, bits: int = 0):
        self.dtype, self.bits = np.dtype(dtype), bits

    def __call__(self, x: Any) -> Any:
        if not self.bits:
            return np.asarray(x).astype(np.float32)[()]
        x = int(x) if isinstance(x, int | np.integer | np.bool_) else np.asarray(x).astype(np.int64)
        half = 1 << (self.bits - 1)
        return ((x + half) & ((half << 1) - 1)) - half if self.bits < 64 else x


def _bfloat16(words: np.ndarray) -> np.ndarray:
    words = words.astype(np.uint32)
    return np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], axis=-1).view(F32)


def _float16(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.float16).reshape(*words.shape, 2).astype(F32)


def _bits16(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "float16":
        return x.astype(np.float16).view(np.uint16).astype(np.int64)
    bits = np.ascontiguousarray(x, F32).view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded)


def _flushed(x: Any) -> Any:
    """With zeros for numbers that are too small to be normal, as of instructions with `ftz`."""
    return np.where(np.abs(F32(x)) < np.finfo(F32).tiny, np.copysign(F32(0), x), F32(x))[()]


def _alike(x: np.ndarray) -> int:
    """The one number that all threads have."""
    assert (x == x[0]).all()
    return int(x[0])


def _signed(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.int32).astype(np.int64)


class Machine:
    """`cuda` and `ops` for kernels, and what they work on."""

    def __init__(self, memory: Memory, counted: bool = False):
        self.memory = memory
        self.counts: Counter[str] | None = Counter() if counted else None
        self.block: Block = None  # type: ignore[assignment]
        self.cuda = SimpleNamespace(
            jit=lambda **options: lambda function: function,
            selp=self._select,
            syncthreads=self._barrier,
            syncthreads_or=self._barrier_or,
            local=SimpleNamespace(array=self._local),
            shared=SimpleNamespace(array=lambda *_, **__: None),
            threadIdx=SimpleNamespace(x=0),
            blockIdx=SimpleNamespace(x=0),
        )
        self.ops = _Ops(self)

    def run(self, launch: Launch) -> None:
        kernel = launch.make(self.cuda, self.ops, *launch.configuration)
        arguments = [
            F32(x) if kind == "float32" else int(x)
            for x, kind in zip(launch.arguments, launch.argument_types, strict=True)
        ]
        for x, kind in zip(arguments, launch.argument_types, strict=True):
            half = 1 << (31 if kind == "int32" else 63)
            assert kind == "float32" or -half <= x < half
        with np.errstate(all="ignore"):
            for number in range(launch.grid[0]):
                self.block = Block(launch, self.counts)
                self.cuda.threadIdx.x, self.cuda.blockIdx.x = np.arange(launch.block[0]), number
                kernel(*arguments)

    @staticmethod
    def _select(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool | np.bool_):
            return x if condition else y
        return np.where(condition, x, y)

    def _barrier(self) -> None:
        self.block.epoch += 1

    def _barrier_or(self, x: Any) -> int:
        self._barrier()
        return int(np.any(x))

    def _local(self, size: int, kind: _Cast) -> np.ndarray:
        if kind.dtype.kind == "f":
            return np.full((size, self.block.threads), np.nan, F32)
        return np.full((size, self.block.threads), -0x55555556, np.int64)


class _Ops:
    """A model of each instruction of `numba_attn.cuda.ptx`, by its name."""

    i16, i32, i64, u8 = _Cast(np.int64, 16), _Cast(np.int64, 32), _Cast(np.int64, 64), None
    f32 = _Cast(np.float32)

    def __init__(self, machine: Machine):
        self._machine = machine
        for kind in ("f32", "float32", "float64", "float16", "bfloat16", "bool"):
            setattr(self, f"load_{kind}", self._load_if(kind))

    @property
    def _block(self) -> Block:
        return self._machine.block

    # Shared memory

    def shared_address(self, array: Any) -> int:
        return 0

    def copy_16(self, condition: Any, to: Any, source: Any, count: Any) -> None:
        block, memory = self._block, self._machine.memory
        chosen = np.flatnonzero(block.lanes(condition, bool))
        to, source, count = (block.lanes(x, np.int64)[chosen] for x in (to, source, count))
        data = np.zeros((len(chosen), 16), np.uint8)
        index = source[:, None] + np.arange(16)
        wanted = np.arange(16) < count[:, None]
        assert ((count == 0) | (source % 16 == 0)).all(), "a copy that is not aligned"
        assert memory.readable[index[wanted]].all(), "a copy from outside the arrays"
        data[wanted] = memory.bytes[index[wanted]]
        words, warps = block.words(to, 16), block.warps[chosen]
        block.note_write(words, warps)
        block.shared[words] = 0xFFFFFFFF
        block.pending.append((words, data.view(np.uint32), warps))

    def commit_copies(self) -> None:
        self._block.groups.append(self._block.pending)
        self._block.pending = []

    def _wait(self, left: int) -> None:
        block = self._block
        while len(block.groups) > left:
            for words, data, warps in block.groups.pop(0):
                block.note_write(words, warps)
                block.shared[words] = data

    def wait_for_all_copies(self) -> None:
        self._wait(0)

    def wait_for_all_but_last(self) -> None:
        self._wait(1)

    def _store_shared(self, name: str, place: Any, *values: np.ndarray, condition: Any = True) -> None:
        block = self._block
        chosen = np.flatnonzero(block.lanes(condition, bool))
        words = block.words(block.lanes(place, np.int64)[chosen], 4 * len(values))
        block.note_write(words, block.warps[chosen])
        block.count_turns(name, words)
        block.shared[words] = np.stack([v.view(np.uint32)[chosen] for v in values], axis=1)

    def store_shared_i32(self, condition: Any, place: Any, x: Any) -> None:
        self._store_shared("store", place, self._block.lanes(x, np.uint32), condition=condition)

    def store_shared_i64(self, condition: Any, place: Any, x: Any) -> None:
        low, high = self._block.lanes(x, np.int64).view(np.uint32).reshape(-1, 2).T
        self._store_shared("store", place, low, high, condition=condition)

    def store_shared_f32(self, place: Any, x: Any) -> None:
        self._store_shared("store", place, self._block.lanes(x, F32))

    def store_shared_f32x2(self, place: Any, x: Any, y: Any) -> None:
        self._store_shared("store", place, self._block.lanes(x, F32), self._block.lanes(y, F32))

    def _load_shared(self, name: str, place: Any, size: int, chosen: Any = slice(None)) -> np.ndarray:
        block = self._block
        words = block.words(np.broadcast_to(place, len(block.warps[chosen])), size)
        block.note_read(words, block.warps[chosen])
        block.count_turns(name, words)
        return block.shared[words]

    def load_shared_i32(self, place: Any) -> np.ndarray:
        return _signed(self._load_shared("load", place, 4)[:, 0])

    def load_shared_i64(self, place: Any) -> np.ndarray:
        return self._load_shared("load", place, 8).copy().view(np.int64)[:, 0]

    def load_alike_i32(self, place: int) -> int:
        return _alike(self.load_shared_i32(place))

    def load_alike_i64(self, place: int) -> int:
        return _alike(self.load_shared_i64(place))

    def load_shared_f32(self, place: Any) -> np.ndarray:
        return self._load_shared("load", place, 4)[:, 0].copy().view(F32)

    def load_shared_16(self, fragment: np.ndarray, first: int, condition: Any, place: Any) -> None:
        chosen = np.flatnonzero(self._block.lanes(condition, bool))
        fragment[first : first + 4] = 0
        loaded = self._load_shared("load 16", self._block.lanes(place, np.int64)[chosen], 16, chosen)
        fragment[first : first + 4, chosen] = _signed(loaded.T)

    def load_matrices(self, fragment: np.ndarray, first: int, place: Any) -> None:
        words = self._load_shared("ldmatrix", place, 16).reshape(-1, 4, 32)
        fragment[first : first + 4] = _signed(words.swapaxes(0, 1).reshape(4, -1))

    def load_transposed(self, fragment: np.ndarray, first: int, place: Any) -> None:
        words = np.ascontiguousarray(self._load_shared("ldmatrix", place, 16))
        matrices = words.view(np.uint16).reshape(-1, 4, 8, 8).swapaxes(-1, -2).astype(np.uint32)
        pairs = (matrices[..., ::2] | matrices[..., 1::2] << np.uint32(16)).reshape(-1, 4, 32)
        fragment[first : first + 4] = _signed(pairs.swapaxes(0, 1).reshape(4, -1))

    # Products

    def _multiply(
        self, numbers: Callable[[np.ndarray], np.ndarray], c: Any, at: int, a: Any, a_at: int, *b: Any
    ) -> None:
        left = numbers(a[a_at : a_at + 4]).reshape(2, 2, -1, 8, 4, 2)  # half of columns, half of rows, warp, row, ...
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
        right = numbers(np.stack([self._block.lanes(x, np.int64) for x in b])).reshape(2, -1, 8, 4, 2)
        right = right.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)
        product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        c[at : at + 4] += product

    def multiply_bfloat16(self, *operands: Any) -> None:
        self._multiply(_bfloat16, *operands)

    def multiply_float16(self, *operands: Any) -> None:
        self._multiply(_float16, *operands)

    def _pack(self, kind: str, x: Any, y: Any) -> np.ndarray:
        x, y = (_bits16(kind, self._block.lanes(v, F32)) for v in (x, y))
        return _signed(x | y << 16)

    def pack_bfloat16(self, x: Any, y: Any) -> np.ndarray:
        return self._pack("bfloat16", x, y)

    def pack_float16(self, x: Any, y: Any) -> np.ndarray:
        return self._pack("float16", x, y)

    lower_bfloat16 = staticmethod(lambda x: _bfloat16(x)[..., 0])
    upper_bfloat16 = staticmethod(lambda x: _bfloat16(x)[..., 1])
    lower_float16 = staticmethod(lambda x: _float16(x)[..., 0])
    upper_float16 = staticmethod(lambda x: _float16(x)[..., 1])

    # Numbers

    exp2 = staticmethod(lambda x: _flushed(np.exp2(_flushed(x))))
    log2 = staticmethod(lambda x: np.log2(_flushed(x)))
    reciprocal = staticmethod(lambda x: _flushed(F32(1) / _flushed(x)))
    maximum = staticmethod(lambda x, y: np.maximum(F32(x), F32(y)))
    larger = staticmethod(lambda x, y: np.fmax(F32(x), F32(y)))
    product = staticmethod(lambda x, y: F32(x) * F32(y))
    magnitude = staticmethod(lambda x: np.abs(F32(x)))
    float_of = staticmethod(lambda x: F32(x))
    multiply_add = staticmethod(lambda x, y, z: F32(np.float64(x) * np.float64(y) + np.float64(z)))
    least = staticmethod(lambda x, y: np.minimum(x, y) if np.ndim(x) or np.ndim(y) else min(x, y))
    most = staticmethod(lambda x, y: np.maximum(x, y) if np.ndim(x) or np.ndim(y) else max(x, y))

    @staticmethod
    def behind(address: Any, n: Any, step: Any) -> Any:
        assert np.abs(n).max() < 1 << 31 and np.abs(step).max() < 1 << 31
        return address + n * step

    @staticmethod
    def quotient(x: Any, y: Any) -> Any:
        return (x & 0xFFFFFFFF) // y

    @staticmethod
    def product_low(x: Any, y: int) -> Any:
        return _signed((np.uint64(x & 0xFFFFFFFF) * np.uint64(y & 0xFFFFFFFF)) & np.uint64(0xFFFFFFFF))

    @staticmethod
    def product_high(x: Any, y: int) -> Any:
        return _signed(np.uint64(x & 0xFFFFFFFF) * np.uint64(y & 0xFFFFFFFF) >> np.uint64(32))

    def exchange_f32(self, x: Any, bits: int) -> np.ndarray:
        return self._block.lanes(x, F32).reshape(-1, 32)[:, _QUAD ^ bits].reshape(-1)

    def exchange_i32(self, x: Any, bits: int) -> np.ndarray:
        return self._block.lanes(x, np.int64).reshape(-1, 32)[:, _QUAD ^ bits].reshape(-1)

    def _of_lane(self, x: np.ndarray, lane: Any) -> np.ndarray:
        lane = self._block.lanes(lane, np.int64).reshape(-1, 32)
        return np.take_along_axis(x.reshape(-1, 32), lane & 31, axis=1).reshape(-1)

    def value_of_lane(self, x: Any, lane: Any) -> np.ndarray:
        return self._of_lane(self._block.lanes(x, F32), lane)

    def bits_of_lane(self, x: Any, lane: Any) -> np.ndarray:
        return self._of_lane(self._block.lanes(x, np.int64), lane)

    def sync_warp(self) -> None:
        pass

    # Global memory

    def load_i64(self, address: int) -> int:
        memory = self._machine.memory
        return int(memory.bytes[memory.at(np.array([address]), 8)].view(np.int64)[0, 0])

    def _load_if(self, kind: str) -> Callable[..., np.ndarray]:
        size = {"float64": 8, "float16": 2, "bfloat16": 2, "bool": 1}.get(kind, 4)

        def load(condition: Any, address: Any, otherwise: Any) -> np.ndarray:
            block, memory = self._block, self._machine.memory
            chosen = np.flatnonzero(block.lanes(condition, bool))
            data = memory.bytes[memory.at(block.lanes(address, np.int64)[chosen], size)]
            result = block.lanes(otherwise, F32).copy()
            if kind == "bfloat16":
                result[chosen] = _bfloat16(data.view(np.uint16)[:, 0])[:, 0]
            else:
                dtype = {"float64": "f8", "float16": "f2", "bool": "u1"}.get(kind, "f4")
                result[chosen] = data.view(dtype)[:, 0]
            return result

        return load

    def _store_if(self, condition: Any, address: Any, *values: np.ndarray) -> None:
        block, memory = self._block, self._machine.memory
        chosen = np.flatnonzero(block.lanes(condition, bool))
        data = np.concatenate([np.ascontiguousarray(v[chosen])[:, None].view(np.uint8) for v in values], axis=1)
        index = memory.at(block.lanes(address, np.int64)[chosen], data.shape[1])
        memory.bytes[index] = data

    def store_f32(self, condition: Any, address: Any, x: Any) -> None:
        self._store_if(condition, address, self._block.lanes(x, F32))

    def store_f32x2(self, condition: Any, address: Any, x: Any, y: Any) -> None:
        self._store_if(condition, address, self._block.lanes(x, F32), self._block.lanes(y, F32))

    def store_16(self, condition: Any, address: Any, *words: Any) -> None:
        self._store_if(condition, address, *(self._block.lanes(x, np.uint32) for x in words))

    def store_i16(self, condition: Any, address: Any, x: Any) -> None:
        self._store_if(condition, address, self._block.lanes(x, np.uint16))
