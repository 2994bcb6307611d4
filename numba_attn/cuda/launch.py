"""Kernels on a device: its memory, machine code as functions of the driver, and their launch.

Nothing here goes through Numba's own launcher, which looks at every argument again in each call: the arguments of a
call are one array of words.  The host waits for no work but that of copying a table, and what a launch needs of memory
is taken in the order of its stream; it can be captured in a CUDA graph, if the tables of the call are on the device
already: if a call like it came before.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numba_attn.cuda import compile, devices, user_functions
from numba_attn.cuda.arguments import Numbers, Reals
from numba_attn.cuda.devices import check

MOST_KEPT = 256  # tables on a device
STATIC_SHARED = 48 * 1024  # bytes that a kernel has without asking
_LEGACY, _BY_THREAD = 1, 2  # the driver's default streams, of all threads and of one


Source = str | int | tuple[Any, ...]
"""Whose memory it is: the caller's array of that name, temporary memory by number, a table by its key."""


class Buffer(NamedTuple):
    """Memory of a device, as a flat array of elements."""

    address: int
    dtype: type[np.generic]
    elements: int = 1 << 40  # of a caller's array, nobody asks
    source: Source = ""
    behind: int = 0  # bytes from where the source begins


class Started(NamedTuple):
    """A kernel that was launched, and how it is for arrays elsewhere."""

    function: Any  # of the driver
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    words: np.ndarray  # its arguments, int64
    moved: list[tuple[int, Source, int]]  # which of these are addresses, of what, and how many bytes behind


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
        with _compiling, devices.on(device):
            driver, cc = devices.api(), devices.compute_capability(device)
            code = compile.compiled(make, configuration, argument_types, cc, launch_bounds)
            library = check(driver.cuLibraryLoadData(code.cubin, None, None, 0, None, None, 0))
            found = check(driver.cuKernelGetFunction(check(driver.cuLibraryGetKernel(library, code.name.encode()))))
            if shared > STATIC_SHARED:
                most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                check(driver.cuFuncSetAttribute(found, most, shared))
            _kernels[key] = found
    return found


# Memory and the interface of `simulator.Machine` ----------------------------------------------------------------------


@dataclass(slots=True)
class _Table:
    """What is the same in many calls, on a device."""

    buffer: Buffer
    captured: bool = False  # read by a graph, whenever that may run


_tables: OrderedDict[Any, _Table] = OrderedDict()


@functools.cache
def _writing_stream(device: int) -> int:
    """On which tables are written, and which waits for no other."""
    driver = devices.api()
    return int(check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))


class Machine:
    """A device and a stream, on which memory is had and given back in the order of its launches."""

    def __init__(self, device: int, stream: int) -> None:
        self.device, self.stream = device, stream
        self.started: list[Started] = []
        self.sizes: list[int] = []  # in bytes, of temporary memory
        self._temporary: list[Buffer] = []
        self._others: list[int] = []  # streams, of arrays
        self._sources: dict[int, Source] = {}  # by address, of what is not the caller's
        self._capturing: bool | None = None

    @contextmanager
    def active(self) -> Iterator[Machine]:
        """What has been taken is given back at the end, and the streams of other arrays wait for what has been done."""
        with devices.on(self.device):
            try:
                yield self
            finally:
                for buffer in self._temporary:
                    self._free(buffer)
                self._temporary.clear()
                for stream in self._others:
                    _order(self.stream, stream)
                self._others.clear()

    def buffer(self, name: str, address: int, behind: int, dtype: type[np.generic], stream: int | None) -> Buffer:
        """Memory of the caller's array of that name, that begins so many bytes behind an address.

        It is used after what is on the stream that the array names, and before what comes there later.
        """
        if stream is not None and stream not in (self.stream, *self._others):
            _order(stream, self.stream)
            self._others.append(stream)
        return Buffer(address + behind, dtype, source=name, behind=behind)

    def empty(self, count: int, dtype: type[np.generic]) -> Buffer:
        """Memory for the time of the call."""
        buffer = self._take(max(count, 1), dtype)._replace(source=len(self._temporary))
        self._temporary.append(buffer)
        self.sizes.append(max(count, 1) * np.dtype(dtype).itemsize)
        self._sources[buffer.address] = buffer.source
        return buffer

    def upload(self, x: np.ndarray) -> Buffer:
        """A copy of a contiguous array, for the time of the call."""
        buffer = self.empty(x.size, x.dtype.type)
        self._copy(buffer, x)
        return buffer

    def download(self, buffer: Buffer, into: np.ndarray) -> None:
        """Copy to a contiguous array, and wait for that."""
        check(devices.api().cuMemcpyDtoHAsync(into.ctypes.data, buffer.address, into.nbytes, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        check(devices.api().cuStreamSynchronize(self.stream))

    def constant(self, x: np.ndarray) -> Buffer:
        """A contiguous array on the device that is there already if one with the same contents was lately."""
        contents = x.tobytes() if x.nbytes <= 4096 else hashlib.blake2b(x, digest_size=32).digest()
        key = self.device, x.dtype.char, x.size, contents
        with _lock:
            buffer = self.table(key)
            if buffer is None:
                if self._is_captured():
                    raise RuntimeError(
                        "a call that is captured in a CUDA graph needs one like it before the capture: "
                        "its tables are not on the device yet"
                    )
                self._forget()
                # By a stream of its own, of which the end is soon: so it is there for whichever stream finds it.  That
                # of the caller may be gone by then, its number another's, or waiting for it not allowed.
                writer = Machine(self.device, _writing_stream(self.device))
                buffer = writer._take(x.size, x.dtype.type)._replace(source=key)
                writer._copy(buffer, x)
                writer.synchronize()
                _tables[key] = _Table(buffer)
        self._sources[buffer.address] = key
        return buffer

    def table(self, key: tuple[Any, ...]) -> Buffer | None:
        """What `constant` has put there, as long as it is."""
        with _lock:
            table = _tables.get(key)
            if table is None:
                return None
            table.captured |= self._is_captured()
            _tables.move_to_end(key)
            return table.buffer

    def function(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A user's function as kernels take it."""
        return user_functions.portable(name, function, self.device)

    @property
    def compute_capability(self) -> tuple[int, int]:
        return devices.compute_capability(self.device)

    def run(self, launch: Any) -> None:
        """Start a kernel that says all about itself, see `tensorcore.Launch`."""
        make, configuration, types, bounds, grid, block, shared, arguments = launch
        function = kernel(make, configuration, types, self.device, bounds, shared)
        moved: list[tuple[int, Source, int]] = [
            (n, self._sources.get(arguments[n], name), 0) for n, name in enumerate(launch.addresses) if arguments[n]
        ]
        self._start(Started(function, grid, block, shared, launch.words(), moved))

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
        moved = [(7 * n + 4, buffer.source, buffer.behind) for n, buffer in enumerate(buffers)]
        self._start(Started(function, (blocks, 1, 1), (threads, 1, 1), 4 * threads, words, moved))

    def _start(self, started: Started) -> None:
        """Launch a kernel whose arguments are the first bytes of its words."""
        function, grid, block, shared, words, _ = started
        places = words.ctypes.data + np.arange(0, words.nbytes, 8, dtype=np.uint64)
        check(devices.api().cuLaunchKernel(function, *grid, *block, shared, self.stream, places.ctypes.data, 0))
        self.started.append(started)

    def _is_captured(self) -> bool:
        if self._capturing is None:
            driver = devices.api()
            none = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
            self._capturing = check(driver.cuStreamIsCapturing(self.stream)) != none
        return self._capturing

    def _take(self, count: int, dtype: type[np.generic]) -> Buffer:
        size = count * np.dtype(dtype).itemsize
        return Buffer(int(check(devices.api().cuMemAllocAsync(size, self.stream))), dtype, count)

    def _copy(self, buffer: Buffer, x: np.ndarray) -> None:
        check(devices.api().cuMemcpyHtoDAsync(buffer.address, x.ctypes.data, x.nbytes, self.stream))

    def _free(self, buffer: Buffer) -> None:
        check(devices.api().cuMemFreeAsync(buffer.address, self.stream))

    def _forget(self) -> None:
        """When there are too many tables, give back the half of them that has not been used for longest."""
        free = [key for key, table in _tables.items() if key[0] == self.device and not table.captured]
        if len(free) >= MOST_KEPT:
            check(devices.api().cuCtxSynchronize())  # whatever streams they may be read on
            for key in free[: len(free) // 2]:
                self._free(_tables.pop(key).buffer)


def _order(earlier: int, later: int) -> None:
    """Let what comes on one stream wait for what is on another now."""
    driver = devices.api()
    event = check(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    try:
        check(driver.cuEventRecord(event, earlier))
        check(driver.cuStreamWaitEvent(later, event, 0))
    finally:
        check(driver.cuEventDestroy(event))


def machine(query: Any) -> Machine:
    """The device and the stream of an array; of NumPy's, the current device, and the default stream of the thread."""
    if isinstance(query, np.ndarray):
        return Machine(devices.current_device(), _BY_THREAD)
    device = devices.current_device() if query.device is None else query.device
    return Machine(device, _LEGACY if query.stream is None else query.stream)


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
