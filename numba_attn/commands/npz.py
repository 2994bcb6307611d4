"""Archives of arrays on disk: read by memory map where the format allows it, written atomically."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_ENCRYPTED = 0x1


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive by name.

    What `numpy.savez` wrote comes as read-only memory maps, of which only what is used is ever read; compressed members
    are read.  Elements of two bytes without a type are bfloat16 numbers, which `numpy.savez` writes so.  Raises
    ValueError for anything that is not such an archive.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"{path} must have one member of each name, got {name} twice")
                arrays[name] = _member(path, archive, info)
    except (NotImplementedError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz archive: {error}") from error
    return arrays


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    try:
        array = _mapped(path, archive, info)
        if array is None:
            with archive.open(info) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        return array if array.dtype != "V2" else _bfloat16(array)
    except MemoryError:
        raise
    except Exception as error:  # damage comes as whatever decompressors, and the parsers of a header, stumble on
        raise ValueError(f"{path}: cannot read {info.filename}: {error}") from error


def _mapped(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray | None:
    """A memory map of a member, or None if its bytes in the file are not those of an array."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
        return None
    with archive.open(info) as file:
        read_header = _HEADER_READERS.get(np.lib.format.read_magic(file))
        if read_header is None:
            return None
        shape, fortran_order, dtype = read_header(file)
        header_size = file.tell()
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or dtype.hasobject:
        return None
    if info.file_size != header_size + size:
        raise ValueError(f"{info.file_size - header_size} bytes of data, its header says {size}")
    # The name and the extra field before the data may be longer or shorter than the central directory's copies.
    with path.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        name_size, extra_size = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + 30 + name_size + extra_size + header_size
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _bfloat16(x: np.ndarray) -> np.ndarray:
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError("bfloat16 numbers need the package ml_dtypes") from None
    return x.view(ml_dtypes.bfloat16)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, and is removed if the block raises.

    A link stays, and what it leads to is replaced; what is no file, as a device, is refused.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(given))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(given))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        file = temporary.open("xb")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(given)) from None  # named as the user knows it
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
