"""Kernels on a device: its memory, machine code as functions of the driver, and their launch.

Nothing here goes through Numba's own launcher, which looks at every argument again in each call: the arguments of a
call are one array of words.  A launch waits for nothing, takes working memory, if any, in the order of its stream, and
can be captured in a CUDA graph, if the tables of the call are on the device already: if a call like it came before.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from numba_attn.cuda import compile, user_functions
from numba_attn.cuda.arguments import Numbers, Reals

OLDEST = (7, 5)  # compute capability: what the toolkits of CUDA 13 compile for
NUMBA_CUDA = (0, 28, 1)
MOST_KEPT = 256  # tables on a device
STATIC_SHARED = 48 * 1024  # bytes that a kernel has without asking
_BY_THREAD = 2  # the driver's default stream of a thread


class Buffer(NamedTuple):
    """Memory of a device, as a flat array of elements."""

    address: int
    dtype: type[np.generic]
    elements: int = 1 << 40  # of a caller's array, nobody asks


@functools.cache
def unavailable() -> str | None:
    """Why there is no device to compute on; None if there is one."""
    for part in (_without_packages, _without_device, _without_toolkit):
        if (reason := part()) is not None:
            return reason
    return None


def _without_packages() -> str | None:
    wanted = ".".join(map(str, NUMBA_CUDA))
    try:
        version = metadata.version("numba-cuda")
    except metadata.PackageNotFoundError:
        return f"numba-cuda {wanted} or later is not installed: python -m pip install 'numba-attn[cuda]'"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < NUMBA_CUDA:
        return f"numba-cuda {wanted} or later is needed, got {version}"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings, a part of numba-cuda, is not installed"
    return None


def _without_device() -> str | None:
    try:
        driver = _driver()
        count = _check(driver.cuDeviceGetCount())
    except Exception as error:  # of the library that looks for it, or of the driver
        return f"there is no NVIDIA driver that works: {_line(error)}"
    if count == 0:
        return "there is no NVIDIA GPU"
    capabilities = [compute_capability(device) for device in range(count)]
    if max(capabilities) < OLDEST:
        return f"the GPU is too old: its compute capability is {max(capabilities)}, {OLDEST} or more is needed"
    return None


def _without_toolkit() -> str | None:
    """NVIDIA's compiler and linker, which `numba-cuda[cu13]` installs if the system has none."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        for library in ("nvvm", "nvJitLink"):
            load_nvidia_dynamic_lib(library)
    except Exception as error:  # each of its own kind
        return f"a library of the CUDA toolkit is missing (python -m pip install 'numba-cuda[cu13]'): {_line(error)}"
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# The driver -----------------------------------------------------------------------------------------------------------


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    _check(driver.cuInit(0))
    return driver


def _check(returned: Any) -> Any:
    """What a function of the driver returns after its status, which must be success."""
    status, *results = returned
    if int(status) != 0:
        raise RuntimeError(f"CUDA driver: {getattr(status, 'name', status)}")
    return results[0] if len(results) == 1 else tuple(results)


@functools.cache
def compute_capability(device: int) -> tuple[int, int]:
    driver = _driver()
    kind = driver.CUdevice_attribute
    names = kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    major, minor = (_check(driver.cuDeviceGetAttribute(name, device)) for name in names)
    return int(major), int(minor)


@functools.cache
def _primary_context(device: int) -> Any:
    """The context that libraries share."""
    return _check(_driver().cuDevicePrimaryCtxRetain(device))


def current_device() -> int:
    """That of the calling thread's context; 0 where it has none."""
    driver = _driver()
    return int(_check(driver.cuCtxGetDevice())) if int(_check(driver.cuCtxGetCurrent())) else 0


@contextmanager
def _on(device: int) -> Iterator[None]:
    driver = _driver()
    if int(_check(driver.cuCtxGetCurrent())) and int(_check(driver.cuCtxGetDevice())) == device:
        yield
        return
    _check(driver.cuCtxPushCurrent(_primary_context(device)))
    try:
        yield
    finally:
        _check(driver.cuCtxPopCurrent())


# Kernels --------------------------------------------------------------------------------------------------------------


_kernels: dict[Any, Any] = {}
_compiling, _lock = threading.RLock(), threading.RLock()


def kernel(
    make: Callable[..., Any],
    configuration: tuple[Any, ...],
    argument_types: tuple[Any, ...],
    device: int,
    launch_bounds: tuple[int, int] | None = None,
    shared: int = 0,
) -> Any:
    """The driver's function for a kernel on a device, that may have so many bytes of dynamic shared memory."""
    key = make, configuration, argument_types, device
    found = _kernels.get(key)
    if found is None:
        with _compiling, _on(device):
            driver, cc = _driver(), compute_capability(device)
            code = compile.compiled(make, configuration, argument_types, cc, launch_bounds)
            library = _check(driver.cuLibraryLoadData(code.cubin, None, None, 0, None, None, 0))
            found = _check(driver.cuKernelGetFunction(_check(driver.cuLibraryGetKernel(library, code.name.encode()))))
            if shared > STATIC_SHARED:
                most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(driver.cuFuncSetAttribute(found, most, shared))
            _kernels[key] = found
    return found


def start(function: Any, grid: tuple[int, ...], block: tuple[int, ...], shared: int, stream: int, words: Any) -> None:
    """Launch a kernel whose arguments are the first bytes of an array of words of eight."""
    places = words.ctypes.data + np.arange(0, words.nbytes, 8, dtype=np.uint64)
    _check(_driver().cuLaunchKernel(function, *grid, *block, shared, stream, places.ctypes.data, 0))


# Memory and the interface of `simulator.Machine` ----------------------------------------------------------------------


@dataclass(slots=True)
class _Table:
    """What is the same in many calls, on a device."""

    buffer: Buffer
    stream: int  # on which it was written
    there: bool = False  # for all streams
    captured: bool = False  # read by a graph, whenever that may run


_tables: OrderedDict[Any, _Table] = OrderedDict()


class Machine:
    """A device and a stream, on which memory is had and given back in the order of its launches."""

    def __init__(self, device: int, stream: int) -> None:
        self.device, self.stream = device, stream
        self._temporary: list[Buffer] = []
        self._capturing: bool | None = None

    @contextmanager
    def active(self) -> Iterator[Machine]:
        """What has been taken is given back at the end."""
        with _on(self.device):
            try:
                yield self
            finally:
                for buffer in self._temporary:
                    self._free(buffer)
                self._temporary.clear()

    def buffer(self, address: int, dtype: type[np.generic]) -> Buffer:
        """Memory of the caller's."""
        return Buffer(address, dtype)

    def empty(self, count: int, dtype: type[np.generic]) -> Buffer:
        """Memory for the time of the call."""
        buffer = self._take(max(count, 1), dtype)
        self._temporary.append(buffer)
        return buffer

    def upload(self, x: np.ndarray) -> Buffer:
        """A copy of a contiguous array, for the time of the call."""
        buffer = self.empty(x.size, x.dtype.type)
        self._copy(buffer, x)
        return buffer

    def download(self, buffer: Buffer, into: np.ndarray) -> None:
        """Copy to a contiguous array, and wait for that."""
        _check(_driver().cuMemcpyDtoHAsync(into.ctypes.data, buffer.address, into.nbytes, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        _check(_driver().cuStreamSynchronize(self.stream))

    def constant(self, x: np.ndarray) -> Buffer:
        """A contiguous array on the device that is there already if one with the same contents was lately."""
        contents = x.tobytes() if x.nbytes <= 4096 else hashlib.blake2b(x, digest_size=32).digest()
        key = self.device, x.dtype.char, x.size, contents
        with _lock:
            table = _tables.get(key)
            if table is None:
                if self._is_captured():
                    raise RuntimeError(
                        "a call that is captured in a CUDA graph needs one like it before the capture: "
                        "its tables are not on the device yet"
                    )
                self._forget()
                table = _tables[key] = _Table(self._take(x.size, x.dtype.type), self.stream)
                self._copy(table.buffer, x)
            elif table.stream != self.stream and not table.there:
                _check(_driver().cuStreamSynchronize(table.stream))
                table.there = True
            table.captured |= self._is_captured()
            _tables.move_to_end(key)
        return table.buffer

    def function(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A user's function as kernels take it."""
        return user_functions.portable(name, function, self.device)

    @property
    def compute_capability(self) -> tuple[int, int]:
        return compute_capability(self.device)

    def run(self, launch: Any) -> None:
        """Start a kernel that says all about itself, see `tensorcore.Launch`."""
        make, configuration, types, bounds, grid, block, shared, _ = launch
        function = kernel(make, configuration, types, self.device, bounds, shared)
        start(function, grid, block, shared, self.stream, launch.words())

    def launch(
        self,
        make: Callable[..., Any],
        configuration: tuple[Any, ...],
        threads: int,
        blocks: int,
        buffers: list[Buffer],
        numbers: Numbers,
        reals: Reals,
    ) -> None:
        types = argument_types(tuple(buffer.dtype for buffer in buffers))
        try:
            function = kernel(make, configuration, types, self.device, (threads, 2))
        except Exception as error:
            raise user_functions.explained(error, configuration) from error
        words = words_of(buffers, numbers, reals)
        start(function, (blocks, 1, 1), (threads, 1, 1), 4 * threads, self.stream, words)

    def _is_captured(self) -> bool:
        if self._capturing is None:
            driver = _driver()
            none = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
            self._capturing = _check(driver.cuStreamIsCapturing(self.stream)) != none
        return self._capturing

    def _take(self, count: int, dtype: type[np.generic]) -> Buffer:
        size = count * np.dtype(dtype).itemsize
        return Buffer(int(_check(_driver().cuMemAllocAsync(size, self.stream))), dtype, count)

    def _copy(self, buffer: Buffer, x: np.ndarray) -> None:
        _check(_driver().cuMemcpyHtoDAsync(buffer.address, x.ctypes.data, x.nbytes, self.stream))

    def _free(self, buffer: Buffer) -> None:
        _check(_driver().cuMemFreeAsync(buffer.address, self.stream))

    def _forget(self) -> None:
        """When there are too many tables, give back the half of them that has not been used for longest."""
        free = [key for key, table in _tables.items() if key[0] == self.device and not table.captured]
        if len(free) >= MOST_KEPT:
            _check(_driver().cuCtxSynchronize())  # whatever streams they may be read on
            for key in free[: len(free) // 2]:
                self._free(_tables.pop(key).buffer)


def machine(query: Any) -> Machine:
    """The device and the stream of an array; of NumPy's, the current device, and the default stream of the thread."""
    if isinstance(query, np.ndarray):
        return Machine(current_device(), _BY_THREAD)
    return Machine(current_device() if query.device is None else query.device, query.stream)


@functools.cache
def argument_types(elements: tuple[type[np.generic], ...]) -> tuple[Any, ...]:
    """Numba's types of the arguments of the portable kernels, of flat arrays with such elements."""
    from numba.cuda import types

    arrays = (types.Array(getattr(types, element.__name__), 1, "C") for element in elements)
    return (
        *arrays,
        types.NamedUniTuple(types.int64, len(Numbers._fields), Numbers),
        types.NamedUniTuple(types.float64, len(Reals._fields), Reals),
    )


def words_of(buffers: list[Buffer], numbers: Numbers, reals: Reals) -> np.ndarray:
    """Arguments as kernels take them: of an array, owner and parent, elements, bytes of one, address, shape, stride."""
    words = np.empty(7 * len(buffers) + len(numbers) + len(reals), np.int64)
    arrays = words[: 7 * len(buffers)].reshape(-1, 7)
    sizes = [np.dtype(buffer.dtype).itemsize for buffer in buffers]
    arrays[:, :2] = 0
    arrays[:, 2] = arrays[:, 5] = [buffer.elements for buffer in buffers]
    arrays[:, 3] = arrays[:, 6] = sizes
    arrays.view(np.uint64)[:, 4] = [buffer.address for buffer in buffers]
    words[7 * len(buffers) : -len(reals)] = numbers
    words[-len(reals) :].view(np.float64)[:] = reals
    return words
