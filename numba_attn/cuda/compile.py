"""From a kernel's source to machine code, and that on disk: `make(cuda, ops, *configuration)` returns the kernel.

`cuda` is the module of numba-cuda, `ops` that of this package with inline PTX, so that another pair can take their
place where there is no GPU.  Numba is imported only where something has to be compiled.  Compiling needs NVIDIA's
NVVM and nvJitLink libraries, but neither a GPU nor its driver.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows, where each process compiles for itself
    fcntl = None  # type: ignore[assignment]

LONGEST_WAIT = 120.0  # seconds for another process to compile: more than any kernel takes
UNUSED = 30 * 24 * 3600.0  # seconds after which what another version has left may go
# Distributions that machine code depends on; those that are not installed count too.
_COMPILERS = (
    "numba", "llvmlite", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink-cu12",
)  # fmt: skip


class Compiled(NamedTuple):
    cubin: bytes
    name: str  # of the kernel in it


_compiled: dict[tuple[Any, ...], Compiled] = {}
_lock = threading.Lock()


def compiled(
    make: Callable[..., Any],
    configuration: tuple[Any, ...],
    argument_types: tuple[Any, ...],
    cc: tuple[Any, ...],
    launch_bounds: tuple[int, ...] | None = None,
) -> Compiled:
    """Machine code of a kernel for devices of a compute capability, from memory, from disk or made now.

    Types are those of Numba or their names, "int64" for example.  Launch bounds are threads in a block and blocks to a
    multiprocessor.  Kernels of this package are kept on disk, unless their configuration has functions, or anything
    else that does not print as itself.
    """
    key = make, configuration, argument_types, cc, launch_bounds
    found = _compiled.get(key)
    if found is None:
        with _lock:
            found = _compiled.get(key)
            if found is None:
                found = _compiled[key] = _from_disk(*key) if _ours(make) and _plain(key[1:]) else _link(*key)
    return found


def ptx(
    make: Callable[..., Any],
    configuration: tuple[Any, ...],
    argument_types: tuple[Any, ...],
    cc: tuple[Any, ...],
    launch_bounds: tuple[int, ...] | None = None,
) -> str:
    """The same kernel as PTX."""
    return str(_library(make, configuration, argument_types, cc, launch_bounds).get_asm_str(cc=cc))


def _library(
    make: Callable[..., Any],
    configuration: tuple[Any, ...],
    argument_types: tuple[Any, ...],
    cc: tuple[Any, ...],
    launch_bounds: tuple[int, ...] | None,
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Numba's own dependencies; what matters here is an error
        cuda: Any = importlib.import_module("numba.cuda")
        if "numba_cuda" not in str(cuda.__file__).replace(os.sep, "/").split("/"):
            raise ImportError("kernels of CUDA are compiled by the package numba-cuda, which is not installed")
        ops = importlib.import_module("numba_attn.cuda.ptx")
        kernel = make(cuda, ops, *configuration)
        types = tuple(getattr(cuda.types, t) if isinstance(t, str) else t for t in argument_types)
        library, _ = cuda.compiler._compile_pyfunc_with_fixup(
            kernel, types, device=False, abi="numba", cc=cc, launch_bounds=launch_bounds
        )
    return library


def _link(*key: Any) -> Compiled:
    library = _library(*key)
    cubin = library.get_cubin(cc=key[3])
    return Compiled(bytes(getattr(cubin, "code", cubin)), library._entry_name)


# On disk --------------------------------------------------------------------------------------------------------------


def _ours(make: Callable[..., Any]) -> bool:
    """Whether the fingerprint is of its source."""
    return make.__module__.startswith(__name__.rpartition(".")[0]) and "<locals>" not in make.__qualname__


def _plain(x: Any) -> bool:
    """Whether the printed form of a value, or of a type of Numba, says all about it."""
    if isinstance(x, tuple):
        return all(map(_plain, x))
    return x is None or type(x) in (bool, int, float, str) or hasattr(x, "mangling_args")


@functools.cache
def directory() -> Path | None:
    """Where machine code is kept: below the first writable of `NUMBA_CACHE_DIR`, the package's `__pycache__` and the
    user's cache directory; None if none is.
    """
    candidates = [Path(__file__).parent / "__pycache__", _of_the_user() / "numba_attn"]
    if os.environ.get("NUMBA_CACHE_DIR"):
        candidates = [Path(os.environ["NUMBA_CACHE_DIR"]) / "numba_attn"]
    for candidate in candidates:
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=candidate).close()
        except OSError:
            continue
        return candidate
    return None


def _of_the_user() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~\\AppData\\Local")).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


@functools.cache
def fingerprint() -> str:
    """Of all that every kernel depends on beside its own configuration: sources and versions."""
    digest = hashlib.sha256(repr([platform.machine(), *map(_version, _COMPILERS)]).encode())
    here = Path(__file__).parent
    for source in [
        *sorted(here.glob("*.py")),
        *(here.parent / name for name in ("block_mask.py", "random.py", "storage.py")),
    ]:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _from_disk(make: Callable[..., Any], *rest: Any) -> Compiled:
    place = directory()
    if place is None:
        return _link(make, *rest)
    name = f"{make.__module__}.{make.__qualname__}"
    digest = hashlib.sha256(repr((name, *rest)).encode()).hexdigest()
    path = place / f"cuda-{fingerprint()[:16]}" / f"{make.__name__}-{digest[:32]}.cubin"
    found = _load(path)
    if found is None:
        with _alone(path) as waited:
            found = _load(path) if waited else None
            if found is None:
                found = _link(make, *rest)
                _save(path, found)
    return found


def _load(path: Path) -> Compiled | None:
    """What was saved; None if nothing was, or not all of it is there."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, entry = data[:32], data[32:]
    if hashlib.sha256(entry).digest() != digest:
        return None
    name, _, cubin = entry.partition(b"\0")
    return Compiled(cubin, name.decode())


def _save(path: Path, entry: Compiled) -> None:
    """Write it at once or not at all; a full disk is no reason for a call to fail."""
    data = entry.name.encode() + b"\0" + entry.cubin
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(hashlib.sha256(data).digest() + data)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)


def _remove_unused(current: Path) -> None:
    """Remove what other versions have left beside the directory of this one, long ago."""
    for other in current.parent.glob("cuda-*"):
        if other != current and time.time() - other.stat().st_mtime > UNUSED:
            shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """One process compiles an entry, others that want it wait; whether this one had to."""
    file, waited, end = None, False, time.monotonic() + LONGEST_WAIT
    with contextlib.suppress(OSError):  # from file systems without locks
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("ab") if fcntl is not None else None
        while file is not None and time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
                time.sleep(0.02)
    try:
        yield waited
    finally:
        if file is not None:
            file.close()
