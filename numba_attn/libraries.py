"""Libraries of arrays: how theirs are read where they lie, and how results become theirs.

torch, JAX, CuPy and numba.cuda are known by name, others by DLPack or the CUDA array interface.  None of them is ever
imported: whoever has such an array has its library in `sys.modules`.  In host memory an array becomes a NumPy array of
the same memory, on a CUDA device a `DeviceArray`; nothing is copied.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from numba_attn import dlpack
from numba_attn.device_array import DeviceArray

_ALIGNED = 16  # bytes: what kernels may ask of an address

# How an array lies on a CUDA device, in all that `Library.view` looks at and kernels may depend on; its address; and
# the stream that it names itself, if any.
Located = tuple[tuple[Any, ...], int, int | None]


def type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def library_of(x: Any) -> Library | None:
    """None for NumPy, and for what is no array."""
    kind = type(x)
    try:
        library = _known[kind]
    except KeyError:
        library = _known.setdefault(kind, _find(kind))  # one for all threads
    # Of the object, not its class: arrays of one class may be on a device or not.
    return _INTERFACE if library is None and hasattr(x, "__cuda_array_interface__") else library


def _find(kind: type) -> Library | None:
    if issubclass(kind, np.ndarray):
        return None
    for library in _LIBRARIES:
        if any(base is not None and issubclass(kind, base) for base in library.classes()):
            return library
    if any(base.__name__ == "DeviceNDArrayBase" for base in kind.__mro__):
        return _NUMBA
    return _DLPack() if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__") else None


class Library:
    """How arrays of a library are read, and how results become its arrays."""

    immutable = False

    def classes(self) -> tuple[type | None, ...]:
        """Of arrays, as far as the library is loaded."""
        return ()

    def view(self, x: Any) -> Any:
        """What `view` returns, or an error of any kind that says why there is no such thing."""
        raise NotImplementedError

    def located(self, x: Any) -> Located | None:
        """Of an array on a CUDA device, in as few steps as it takes; None if that is not known."""
        return None

    def stream(self, x: Any) -> int:
        """That of work on an array which has been located."""
        raise NotImplementedError

    def empty(self, like: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A new array on the CUDA device of `like`."""
        raise NotImplementedError(f"out must be given, as no library is known that makes a {type_name(like)}")

    def give(self, like: Any, x: np.ndarray) -> Any:
        """A result in host memory."""
        raise NotImplementedError

    def wrote(self, out: Any) -> None:
        """What a library is to be told of an array of its own that was written to."""

    def on_device(
        self, x: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, **more: Any
    ) -> DeviceArray:
        def allocate(shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
            made: DeviceArray = self.view(self.empty(x, shape, dtype))
            return made

        _check_memory(address, shape)
        return DeviceArray(address, shape, strides, _native(dtype), owner=x, allocate=allocate, **more)


class _Torch(Library):
    def classes(self) -> tuple[type | None, ...]:
        return (_loaded("torch", "Tensor"),)

    def view(self, x: Any) -> Any:
        torch = sys.modules["torch"]
        if x.requires_grad:
            raise TypeError(
                "it requires gradients, which are not recorded: give its .detach(), or have them computed by "
                "scaled_dot_product_attention_vjp"
            )
        if x.layout is not torch.strided:
            raise TypeError(f"its layout is {x.layout}")
        if x.device.type == "cpu":
            return x.view(torch.int16).numpy().view(_bfloat16()) if x.dtype is torch.bfloat16 else x.numpy()
        if x.device.type != "cuda" or torch.version.hip:
            raise TypeError(f"it is on device {x.device}, neither the host nor CUDA's")
        if x.is_neg() or x.is_quantized:
            raise TypeError("its elements are not those in memory, but negated or quantised")
        return self.on_device(
            x,
            address=x.data_ptr(),
            shape=tuple(x.shape),
            strides=tuple(x.itemsize * step for step in x.stride()),
            dtype=_dtype(str(x.dtype).removeprefix("torch.")),
            device=x.device.index,
            stream=self.stream(x),
        )

    def located(self, x: Any) -> Located | None:
        torch = sys.modules["torch"]
        # Subclasses may lie as they like.
        if type(x) is not torch.Tensor or not x.is_cuda or x.layout is not torch.strided:
            return None
        address = x.data_ptr()
        return (
            x.shape, x.stride(), x.dtype, x.get_device(), address % _ALIGNED,
            x.requires_grad, x.is_neg(), x.is_quantized,
        ), address, None  # fmt: skip

    def stream(self, x: Any) -> int:
        """The current one, by a function of torch's compiled code, which is faster by microseconds, if it is there."""
        torch, device = sys.modules["torch"], x.get_device()
        try:
            return torch._C._cuda_getCurrentRawStream(device)
        except AttributeError:
            return torch.cuda.current_stream(device).cuda_stream

    def empty(self, like: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype.name))

    def give(self, like: Any, x: np.ndarray) -> Any:
        torch = sys.modules["torch"]
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def wrote(self, out: Any) -> None:
        sys.modules["torch"].autograd.graph.increment_version(out)


class _JAX(Library):
    immutable = True

    def classes(self) -> tuple[type | None, ...]:
        return _loaded("jax", "Array"), _loaded("jax", "core", "Tracer")

    def view(self, x: Any) -> Any:
        jax = sys.modules["jax"]
        if isinstance(x, jax.core.Tracer):
            raise TypeError("kernels are not traced: call outside of jit, grad and vmap, or by jax.pure_callback")
        places = x.devices()
        if len(places) > 1:
            raise TypeError(f"it is on {len(places)} devices")
        (place,) = places
        if x.dtype == np.float64 and not jax.config.jax_enable_x64:
            raise TypeError("results in float64 need jax_enable_x64")
        if place.platform == "cpu":
            return np.asarray(x)  # without a copy
        if place.platform != "gpu" or x.__dlpack_device__()[0] not in dlpack.CUDA:
            raise TypeError(f"it is on {place}, neither the host nor a CUDA device")
        return self.on_device(x, *_described(found := dlpack.export(x, stream=1)), awaited=True, **_kept(found))

    def empty(self, like: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A new array that nothing has been made of yet, so that JAX cannot tell that it is written to later."""
        (place,) = like.devices()
        return sys.modules["jax"].numpy.empty(shape, dtype, device=place).block_until_ready()

    def give(self, like: Any, x: np.ndarray) -> Any:
        (place,) = like.devices()
        return sys.modules["jax"].device_put(x, place)


class _CuPy(Library):
    def classes(self) -> tuple[type | None, ...]:
        return (_loaded("cupy", "ndarray"),)

    def view(self, x: Any) -> Any:
        return self.on_device(x, x.data.ptr, x.shape, x.strides, x.dtype, device=x.device.id, stream=self.stream(x))

    def located(self, x: Any) -> Located | None:
        address = x.data.ptr
        return (x.shape, x.strides, x.dtype, x.device.id, address % _ALIGNED), address, None

    def stream(self, x: Any) -> int:
        return sys.modules["cupy"].cuda.get_current_stream(x.device.id).ptr

    def empty(self, like: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        with like.device:
            return sys.modules["cupy"].empty(shape, dtype)


class _Interface(Library):
    """What has `__cuda_array_interface__`; see https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def told(self, x: Any) -> dict[str, Any]:
        """What an array says of itself."""
        return x.__cuda_array_interface__

    def view(self, x: Any) -> Any:
        told = self.told(x)
        if told.get("mask") is not None:
            raise TypeError("it is masked")
        dtype, shape, (address, read_only) = np.dtype(told["typestr"]), told["shape"], told["data"]
        strides = told.get("strides")
        if strides is None:
            strides = tuple(dtype.itemsize * step for step in dlpack.contiguous(shape))
        return self.on_device(
            x, address, shape, strides, dtype, stream=told.get("stream") or None, writeable=not read_only
        )

    def located(self, x: Any) -> Located | None:
        told = self.told(x)
        address, read_only = told["data"]
        form = told["shape"], told.get("strides"), told["typestr"], address % _ALIGNED, read_only
        return None if told.get("mask") is not None else (form, address, told.get("stream") or None)

    def stream(self, x: Any) -> int:
        return self.told(x).get("stream") or 1


class _NumbaCUDA(_Interface):
    def told(self, x: Any) -> dict[str, Any]:
        """With strides: Numba tells none of an array that is broadcast, which it takes for contiguous."""
        return {**x.__cuda_array_interface__, "strides": x.strides}

    def empty(self, like: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return sys.modules["numba.cuda"].device_array(shape, dtype, stream=like.stream)  # type: ignore[attr-defined]


class _DLPack(Library):
    """One class of arrays that speak DLPack; what else they can do, the array API's namespace has."""

    def view(self, x: Any) -> Any:
        kind = x.__dlpack_device__()[0]
        if kind not in dlpack.HOST + dlpack.CUDA:
            raise TypeError(
                f"it is on a device of DLPack's type {int(kind)}, neither in host memory nor on a CUDA device"
            )
        # On a device, the contents are asked to be ready on the legacy default stream; and results are awaited, as the
        # library cannot be told on which stream they come.
        found = dlpack.export(x) if kind in dlpack.HOST else dlpack.export(x, stream=1)
        if found.device[0] in dlpack.HOST:
            return _in_host_memory((x, found.capsule), *_described(found), bool(found.writeable))
        return self.on_device(x, *_described(found), awaited=True, **_kept(found))

    def empty(self, like: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        if not hasattr(like, "__array_namespace__"):
            return super().empty(like, shape, dtype)
        namespace = like.__array_namespace__()
        return namespace.empty(shape, dtype=getattr(namespace, dtype.name), device=like.device)

    def give(self, like: Any, x: np.ndarray) -> Any:
        """NumPy's array if there is no namespace, or it cannot take such numbers from NumPy."""
        if not hasattr(like, "__array_namespace__") or x.dtype.name == "bfloat16":
            return x
        return like.__array_namespace__().from_dlpack(x)


_LIBRARIES = (_Torch(), _JAX(), _CuPy())
_NUMBA, _INTERFACE = _NumbaCUDA(), _Interface()
_known: dict[type, Library | None] = {}  # by class


def _loaded(module: str, *names: str) -> type | None:
    found = sys.modules.get(module)
    for name in names:
        found = getattr(found, name, None)
    return found if isinstance(found, type) else None


# Memory ---------------------------------------------------------------------------------------------------------------


def _check_memory(address: int, shape: tuple[int, ...]) -> None:
    if not address and 0 not in shape:
        raise TypeError(f"it has no memory, for shape {shape}")


class _Memory:
    """What NumPy makes an array of, and keeps as long as that."""

    def __init__(self, alive: Any, interface: dict[str, Any]) -> None:
        self.alive, self.__array_interface__ = alive, interface


def _in_host_memory(
    alive: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, writeable: bool
) -> np.ndarray:
    _check_memory(address, shape)
    interface = {
        "version": 3,
        "typestr": f"|V{dtype.itemsize}" if dtype.name == "bfloat16" else dtype.str,
        "shape": shape,
        "strides": strides,
        "data": (address, not writeable),
    }
    return np.asarray(_Memory(alive, interface)).view(dtype)


def _described(found: dlpack.Capsule) -> tuple[int, tuple[int, ...], tuple[int, ...], np.dtype]:
    """Address, shape, strides in bytes and dtype of what a capsule tells of."""
    dtype = _dtype(found.dtype, found.bits)
    return found.address, found.shape, tuple(dtype.itemsize * step for step in found.strides), dtype


def _kept(found: dlpack.Capsule) -> dict[str, Any]:
    """The rest of what a `DeviceArray` is to know of it."""
    return {"device": found.device[1], "writeable": bool(found.writeable), "alive": found.capsule}


def _dtype(name: str, bits: int | None = None) -> np.dtype:
    """NumPy's dtype of that name, with so many bits."""
    if name == "bfloat16":
        return _bfloat16()
    try:
        found = np.dtype(name)
    except TypeError:
        found = None
    if found is None or bits not in (None, 8 * found.itemsize):
        raise TypeError(f"NumPy has no {name}")
    return found


def _bfloat16() -> np.dtype:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise TypeError("bfloat16 needs the package ml_dtypes: pip install 'numba_attn[bf16]'") from None
    return np.dtype(bfloat16)


def _native(dtype: np.dtype) -> np.dtype:
    if not dtype.isnative:
        raise TypeError(f"{dtype} is not in the byte order of this machine")
    return dtype
