"""Stand-ins for arrays of other libraries, on devices that need not be there."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

_new = ctypes.pythonapi.PyCapsule_New
_new.argtypes, _new.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
_NAMES = b"dltensor", b"dltensor_versioned", b"used_dltensor"  # capsules have no copy of theirs

CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}


SIZES = B, HQ, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 7, 8, 6
OPERANDS = ("query", "key", "value")


def arguments() -> dict[str, Any]:
    """Every argument that is an array."""
    rng = np.random.default_rng(0)
    return {
        "query": rng.standard_normal((B, HQ, LQ, D), dtype=np.float32),
        "key": rng.standard_normal((B, HKV, LK, D), dtype=np.float32),
        "value": rng.standard_normal((B, HKV, LK, DV), dtype=np.float32),
        "attn_mask": rng.random((LQ, LK)) < 0.8,
        "alibi_slopes": rng.standard_normal(HQ, dtype=np.float32),
        "sinks": rng.standard_normal(HQ, dtype=np.float32),
        "query_lengths": np.array([LQ, 3]),
        "kv_lengths": np.array([6, LK]),
        "query_offset": np.array([1, -1]),
    }


class Exported:
    """Speaks DLPack as NumPy does, and nothing else."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.x.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)


class ExportedOfOld(Exported):
    """Before DLPack had versions."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.x.__dlpack__()


class InNamespace(Exported):
    """With the array API's way to make others."""

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda x: InNamespace(np.from_dlpack(x)))


class Described:
    """Nothing but what a DLPack capsule says."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: Any = "f4",
        strides: tuple[int, ...] | None = None,
        *,
        code: int | None = None,
        bits: int | None = None,
        lanes: int = 1,
        offset: int = 0,
        device: tuple[int, int] = (1, 0),
        version: tuple[int, int] | None = (1, 0),
        flags: int = 0,
        name: bytes | None = None,
    ) -> None:
        dtype = np.dtype(dtype)
        self.device, self.streams = device, []  # type: tuple[int, int], list[Any]
        axes = ctypes.c_int64 * len(shape)
        self._shape, self._strides = axes(*shape), None if strides is None else axes(*strides)

        class Tensor(ctypes.Structure):
            _fields_ = (
                ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("offset", ctypes.c_uint64),
            )  # fmt: skip

        class Versioned(ctypes.Structure):
            _fields_ = (
                ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor),
            )  # fmt: skip

        code = CODES[dtype.kind] if code is None else code
        tensor = Tensor(
            address, *device, len(shape), code, bits or 8 * dtype.itemsize, lanes,
            ctypes.addressof(self._shape), None if self._strides is None else ctypes.addressof(self._strides), offset,
        )  # fmt: skip
        if version is None:
            self._content: Any = tensor
        else:
            self._content = Versioned(*version, None, None, flags, tensor)
        self._name = name or _NAMES[version is not None]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.streams.append(stream)
        return _new(ctypes.addressof(self._content), _NAMES[_NAMES.index(self._name)], None)


class Interface:
    """What has `__cuda_array_interface__`, at an invented address."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = "f4", address: int = 1 << 40, **told: Any) -> None:
        typestr = dtype if isinstance(dtype, str) and dtype[0] in "<>|" else np.dtype(dtype).str
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (address, False), "version": 3, **told,
        }  # fmt: skip


def addresses() -> Iterator[int]:
    """Of arrays that do not touch."""
    return itertools.count(1 << 40, 1 << 24)


# Libraries, as far as they are used -----------------------------------------------------------------------------------


def torch_with_cuda() -> ModuleType:
    """Tensors on CUDA device 1, with the current stream 77."""
    torch, free = ModuleType("torch"), addresses()

    class Type(str):
        pass

    class Tensor:
        requires_grad = is_quantized = False
        negated, is_cuda = False, True

        def __init__(self, shape: tuple[int, ...], dtype: Any = "float32", device: int = 1) -> None:
            self.shape, self.dtype, self.layout = shape, getattr(torch, dtype), torch.strided
            self.device = SimpleNamespace(type="cuda", index=device)
            self.itemsize = 2 if dtype.endswith("16") else np.dtype(dtype).itemsize
            self._address = next(free)
            self._strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))

        def data_ptr(self) -> int:
            return self._address

        def stride(self) -> tuple[int, ...]:
            return self._strides

        def get_device(self) -> int:
            return int(self.device.index)

        def is_neg(self) -> bool:
            return self.negated

        def new_empty(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
            return Tensor(tuple(shape), dtype.removeprefix("torch."), self.device.index)

    for name in ("float32", "float16", "bfloat16", "float64", "bool", "int64"):
        setattr(torch, name, Type(f"torch.{name}"))
    torch.strided, torch.Tensor = "strided", Tensor  # type: ignore[attr-defined]
    torch.autograd = SimpleNamespace(graph=SimpleNamespace(increment_version=lambda x: None))  # type: ignore[attr-defined]
    torch.version = SimpleNamespace(hip=None)  # type: ignore[attr-defined]
    torch.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=77))  # type: ignore[attr-defined]
    return torch


def cupy_with_cuda() -> ModuleType:
    """Arrays on whichever device is current, with stream 1000 + its number."""
    cupy, free = ModuleType("cupy"), addresses()
    current = [0]

    @contextlib.contextmanager
    def on(device: int) -> Iterator[None]:
        before, current[0] = current[0], device
        yield
        current[0] = before

    class Device:
        def __init__(self, number: int) -> None:
            self.id = number

        def __enter__(self) -> None:
            self._on = on(self.id)
            self._on.__enter__()

        def __exit__(self, *exception: object) -> None:
            self._on.__exit__(None, None, None)

    class ndarray:
        def __init__(self, shape: tuple[int, ...], dtype: Any = "f4") -> None:
            like = np.empty(shape, dtype)
            self.shape, self.strides, self.dtype = like.shape, like.strides, like.dtype
            self.device, self.data = Device(current[0]), SimpleNamespace(ptr=next(free))

    cupy.ndarray = cupy.empty = ndarray  # type: ignore[attr-defined]
    cupy.on = on  # type: ignore[attr-defined]
    cupy.cuda = SimpleNamespace(get_current_stream=lambda device: SimpleNamespace(ptr=1000 + device))  # type: ignore[attr-defined]
    return cupy


def numba_cuda() -> ModuleType:
    """Device arrays, which tell no strides where they take themselves for contiguous: also where one of them is 0."""
    cuda, free = ModuleType("numba.cuda"), addresses()

    class DeviceNDArrayBase(Interface):
        def __init__(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None, stream: int) -> None:
            usual = np.empty(shape, dtype).strides
            self.strides = usual if strides is None else strides
            contiguous = all(step in (0, one) for step, one in zip(self.strides, usual, strict=True))
            strides = None if contiguous else self.strides
            self.stream = stream
            super().__init__(shape, dtype, next(free), stream=stream or None, strides=strides)

    class DeviceNDArray(DeviceNDArrayBase):
        pass

    def device_array(
        shape: tuple[int, ...], dtype: Any = "f4", strides: tuple[int, ...] | None = None, stream: int = 0
    ) -> DeviceNDArray:
        return DeviceNDArray(shape, dtype, strides, stream)

    cuda.device_array = device_array  # type: ignore[attr-defined]
    return cuda


def jax_with_gpu(kind: int = 2) -> ModuleType:
    """Arrays on device 3 of a DLPack type, CUDA's if it is not given; `ready` keeps those that have been waited for."""
    jax, free = ModuleType("jax"), addresses()

    class Device:
        platform = "gpu"

        def __repr__(self) -> str:
            return "cuda:3"

    device, ready = Device(), []

    class Array(Described):
        def __init__(self, shape: tuple[int, ...], dtype: Any = "f4") -> None:
            bfloat16 = np.dtype(dtype).name == "bfloat16"
            told: dict[str, Any] = {"code": 4, "bits": 16} if bfloat16 else {}
            super().__init__(next(free), shape, dtype, device=(kind, 3), version=None, **told)
            self.shape, self.dtype = shape, np.dtype(dtype)

        def devices(self) -> set[Any]:
            return {device}

        def block_until_ready(self) -> Array:
            ready.append(self)
            return self

    def empty(shape: tuple[int, ...], dtype: Any, device: Any) -> Array:
        assert device is jax.device  # type: ignore[attr-defined]
        return Array(shape, dtype)

    jax.Array, jax.core = Array, SimpleNamespace(Tracer=type("Tracer", (), {}))  # type: ignore[attr-defined]
    jax.config, jax.numpy = SimpleNamespace(jax_enable_x64=False), SimpleNamespace(empty=empty)  # type: ignore[attr-defined]
    jax.device, jax.ready = device, ready  # type: ignore[attr-defined]
    return jax
