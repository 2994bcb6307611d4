"""A CUDA driver whose device is this process: memory of the host, and kernels that Numba's simulator runs.

It stands in for `cuda.bindings.driver` in tests of what the launcher asks of the real one, with the names of that.
What is copied to the device arrives when its stream is waited for or does something else; the rest is done at once.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from numba_attn.cuda import devices, launch, simulator
from numba_attn.cuda.arguments import Numbers, Reals
from numba_attn.cuda.compile import Compiled

WRITING = 1000  # the stream that the launcher makes for itself


class Driver:
    """Keeps what it is asked for in `calls`, and memory in `memory`, by address."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0)

    def __init__(self, capability: tuple[int, int] = (9, 0), devices: int = 1) -> None:
        self.capability, self.devices = capability, devices
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, np.ndarray] = {}
        self.kernels: dict[bytes, Any] = {}
        self.events: dict[int, int | None] = {}  # on which stream they are recorded
        self._contexts = threading.local()
        self.capturing = 0
        self._copies: defaultdict[Any, list[tuple[int, bytes]]] = defaultdict(list)  # on their way, by stream
        self._names = itertools.count()

    @property
    def contexts(self) -> list[int]:
        """Of the calling thread, the current one last."""
        return vars(self._contexts).setdefault("stack", [])

    def compiled(self, make: Any, configuration: Any, types: Any, cc: Any, bounds: Any) -> Compiled:
        """In the place of `compile.compiled`."""
        assert cc == self.capability
        name = f"kernel{next(self._names)}"
        self.kernels[name.encode()] = make, configuration, types, bounds
        return Compiled(b"code", name)

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        done = object.__getattribute__(self, f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            results = done(*arguments)
            return (0, *results) if isinstance(results, tuple) else (0, results) if results is not None else (0,)

        return call

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [rest for call, *rest in self.calls if call == name]

    def _cuInit(self, flags: int) -> None: ...

    def _cuDeviceGetCount(self) -> int:
        return self.devices

    def _cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return self.capability[attribute]

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        return 100 + device

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return (0, self.contexts[-1] - 100) if self.contexts else (201, 0)

    def _cuCtxPushCurrent(self, context: int) -> None:
        self.contexts.append(context)

    def _cuCtxPopCurrent(self) -> int:
        return self.contexts.pop()

    def _cuLibraryLoadData(self, code: bytes, *options: Any) -> int:
        assert code == b"code" and options == (None, None, 0, None, None, 0)
        return 1

    def _cuLibraryGetKernel(self, library: int, name: bytes) -> bytes:
        return name

    def _cuKernelGetFunction(self, kernel: bytes) -> bytes:
        return kernel

    def _cuFuncSetAttribute(self, function: bytes, attribute: str, value: int) -> None: ...

    def _cuStreamCreate(self, flags: int) -> int:
        assert self.contexts and flags == 1
        return WRITING

    def _cuStreamIsCapturing(self, stream: int) -> int:
        return self.capturing

    @staticmethod
    def _itself(stream: int) -> tuple[int, int]:
        """A stream beyond its number: 2 is another in each thread."""
        return stream, threading.get_ident() if stream == 2 else 0

    def send(self, data: bytes, device: int, stream: int) -> None:
        """A copy to memory of the device that arrives later."""
        self._copies[self._itself(stream)].append((device, data))

    def _arrive(self, stream: int) -> None:
        """Do what is on its way on a stream."""
        for device, data in self._copies.pop(self._itself(stream), ()):
            ctypes.memmove(device, data, len(data))

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert not self.capturing
        self._arrive(stream)

    def _cuEventCreate(self, flags: int) -> int:
        assert self.contexts and flags == 2
        self.events[event := len(self.calls)] = None
        return event

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self.events[event] = stream

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        recorded = self.events[event]
        assert recorded is not None and flags == 0
        self._arrive(recorded)

    def _cuEventDestroy(self, event: int) -> None:
        del self.events[event]

    def _cuCtxSynchronize(self) -> None:
        assert not self.capturing

    def _cuMemAllocAsync(self, size: int, stream: int) -> int:
        assert self.contexts and size > 0
        buffer = np.full(-(-size // 8) * 8, 0xFF, np.uint8)  # not a number in any type
        self.memory[buffer.ctypes.data] = buffer
        return buffer.ctypes.data

    def _cuMemFreeAsync(self, address: int, stream: int) -> None:
        self._arrive(stream)
        del self.memory[address]

    def _cuMemcpyHtoDAsync(self, device: int, host: int, size: int, stream: int) -> None:
        assert size <= self.memory[device].size
        self.send(ctypes.string_at(host, size), device, stream)

    def _cuMemcpyDtoHAsync(self, host: int, device: int, size: int, stream: int) -> None:
        assert size <= self.memory[device].size
        self._arrive(stream)
        ctypes.memmove(host, device, size)

    def _cuLaunchKernel(self, function: bytes, x: int, y: int, z: int, threads: int, *rest: Any) -> None:
        """Run it on the memory that its arguments say."""
        ty, tz, shared, stream, parameters, extra = rest
        self._arrive(stream)
        assert (y, z, ty, tz, extra) == (1, 1, 1, 1, 0) and shared == 4 * threads and self.contexts
        make, configuration, types, bounds = self.kernels[function]
        assert bounds[0] == threads
        arrays, integers, floats = types, len(Numbers._fields), len(Reals._fields)
        count = 7 * len(arrays) + integers + floats
        places = array_at(parameters, np.uint64, count)
        words = int(places[0])
        assert (np.diff(places) == 8).all()
        given, buffers = array_at(words, np.int64, count), []
        for element, (owner, parent, elements, itemsize, address, shape, stride) in zip(
            arrays, given[: 7 * len(arrays)].reshape(-1, 7).tolist(), strict=True
        ):
            dtype = np.dtype(element)
            assert (owner, parent, itemsize, stride) == (0, 0, dtype.itemsize, dtype.itemsize) and elements == shape
            buffers.append(array_at(address, dtype, min(elements, 1 << 20)))
        numbers = Numbers(*given[7 * len(arrays) : -floats].tolist())
        reals = Reals(*given[-floats:].view(np.float64).tolist())
        simulator.Machine().launch(make, configuration, threads, x, buffers, numbers, reals)


def array_at(address: int, dtype: Any, count: int) -> np.ndarray:
    """An array over memory, which may be given longer than it is."""
    dtype = np.dtype(dtype)
    return np.frombuffer((ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address), dtype)


def install(patch: Any, driver: Driver) -> None:
    """Let the launcher work with this driver, from a fresh start."""
    patch.setattr(devices, "api", lambda: driver)
    patch.setattr(launch.compile, "compiled", driver.compiled)
    patch.setattr(launch, "argument_types", tuple)  # of elements alone; Numba's types are for its compiler
    patch.setattr(launch, "_tables", type(launch._tables)())
    patch.setattr(launch, "_kernels", {})
    launch._writing_stream.cache_clear()
    for name in ("compute_capability", "_primary_context", "unavailable"):
        getattr(devices, name).cache_clear()
