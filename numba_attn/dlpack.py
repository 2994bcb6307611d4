"""What a DLPack capsule says of an array: where it is and what it is made of.

A capsule that nobody has consumed frees its array when it is itself freed, so it is enough to keep it as long as the
array is used.  The structures are those of DLPack 0.8 and 1: https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

HOST = (1, 3, 11)  # types of device whose memory the processor reads: its own, pinned by CUDA, by ROCm
CUDA = (2, 13)  # the device's own, managed

_NAMES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_READ_ONLY, _COPIED = 1, 2


class Capsule(NamedTuple):
    """An array, and the capsule that keeps it."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # NumPy's name if it has such numbers
    bits: int  # of a number
    device: tuple[int, int]  # type and number
    writeable: bool | None  # None if the capsule is of a version that does not tell
    capsule: Any


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes, _is_valid.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


def export(x: Any, **stream: int) -> Capsule:
    """What `x.__dlpack__` says; it raises what it likes, and `BufferError` is raised for what is not understood."""
    try:
        capsule = x.__dlpack__(max_version=(1, 0), **stream)
    except TypeError:  # of a version before there were any
        capsule = x.__dlpack__(**stream)
    if _is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise BufferError(f"DLPack {versioned.major}.{versioned.minor} is not understood, but versions up to 1 are")
        tensor, writeable = versioned.tensor, not versioned.flags & (_READ_ONLY | _COPIED)
    elif _is_valid(capsule, b"dltensor"):
        tensor, writeable = _Tensor.from_address(_pointer(capsule, b"dltensor")), None
    else:
        raise BufferError("__dlpack__ has not given a DLPack capsule")
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.ndim and tensor.strides else contiguous(shape)
    name = _NAMES.get(tensor.code, f"DLPack's type {tensor.code} with bits: ") + str(tensor.bits)
    if tensor.lanes != 1:
        name = f"vectors of {tensor.lanes} {name}"
    return Capsule(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=strides,
        dtype="bool" if name == "bool8" else name,
        bits=tensor.bits,
        device=(tensor.device_type, tensor.device_id),
        writeable=writeable,
        capsule=capsule,
    )


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, stride = [], 1
    for n in shape[::-1]:
        strides.append(stride)
        stride *= n
    return tuple(strides[::-1])
