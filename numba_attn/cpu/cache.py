"""Compiled kernels on disk: where they are, what they depend on, and how processes share them.

Numba's own cache looks only at the file that defines an entry point, not at the helpers compiled into it, and keeps an
index beside its data, which processes that start together can leave pointing at each other's.  Here every kernel is a
file of its own, whose name is a digest of all that it depends on and whose contents carry a digest of theirs: what is
there and whole is right, whoever wrote it.  A lock, where the file system has locks, lets one process compile and the
others wait for what it writes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import llvmlite
import numba
from numba.core.caching import FunctionCache, dumps
from numba.core.runtime import rtsys

from numba_attn.cpu import target

try:
    import fcntl
except ImportError:  # Windows, where each process compiles for itself
    fcntl = None  # type: ignore[assignment]

LONGEST_WAIT = 120.0  # seconds for another process to compile: more than any kernel takes
UNUSED = 30 * 24 * 3600.0  # seconds after which what another version has left may go


@functools.cache
def directory() -> Path | None:
    """Where compiled kernels are kept: the first writable of `NUMBA_CACHE_DIR`, the package's own `__pycache__` and the
    user's cache directory; None if none is, and then every process compiles for itself.
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
    """Of all that every kernel depends on beside its own function: the sources of this package, and the versions."""
    versions = numba.__version__, llvmlite.__version__, sys.implementation.cache_tag, target.ISA, target.BFLOAT16
    digest = hashlib.sha256(repr(versions).encode())
    here = Path(__file__).parent
    above = [
        here.parent / name for name in ("block_mask.py", "random.py", "storage.py")
    ]  # of which kernels have constants
    for source in [*sorted(here.glob("*.py")), *above]:
        digest.update(source.read_bytes())
    return digest.hexdigest()


class _Locator:
    """What Numba asks about a function before it caches it."""

    _py_file = __file__  # for a warning

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Locator:
        return cls()

    def ensure_cache_path(self) -> None:
        Path(self.get_cache_path()).mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(Path(str(directory())) / fingerprint()[:16])

    def get_source_stamp(self) -> str:
        return fingerprint()

    def get_disambiguator(self) -> str:
        return ""


class _Entries:
    """The compiled forms of one function, in Numba's place of an index and data files."""

    def __init__(self, path: str, name: str):
        self._directory, self._name = Path(path), name

    def path(self, key: tuple[Any, ...]) -> Path:
        # Of signature, processor and bytecode; types say all about themselves in their names.
        return self._directory / f"{self._name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.nbc"

    def load(self, key: tuple[Any, ...]) -> Any:
        """What was saved; None if nothing was, or not all of it is there."""
        try:
            data = self.path(key).read_bytes()
        except OSError:
            return None
        digest, entry = data[:32], data[32:]
        return pickle.loads(entry) if hashlib.sha256(entry).digest() == digest else None

    def save(self, key: tuple[Any, ...], compiled: Any) -> None:
        """Write an entry at once or not at all; a full disk is no reason for a call to fail."""
        entry = dumps(compiled)
        with contextlib.suppress(OSError):
            _remove_unused(self._directory)
            with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".tmp", delete=False) as file:
                try:
                    file.write(hashlib.sha256(entry).digest() + entry)
                    file.close()
                    os.replace(file.name, self.path(key))
                except OSError:
                    os.unlink(file.name)

    def flush(self) -> None:
        for path in self._directory.glob(f"{self._name}-*.nbc"):
            path.unlink(missing_ok=True)


def _remove_unused(current: Path) -> None:
    """Remove what other versions have left beside the directory of this one, long ago."""
    current.mkdir(parents=True, exist_ok=True)
    for other in current.parent.iterdir():
        ours = len(other.name) == len(current.name) and set(other.name) <= set("0123456789abcdef")
        if ours and other != current and time.time() - other.stat().st_mtime > UNUSED:
            shutil.rmtree(other, ignore_errors=True)


class _OneProcess:
    """A lock on an entry of the cache: one process compiles it, others that want it wait for what is saved."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def acquire(self, entry: Path) -> bool:
        """Whether another process had to be waited for, so that there may be an entry now."""
        if fcntl is None or self._file is not None:
            return False
        waited, end = False, time.monotonic() + LONGEST_WAIT
        with contextlib.suppress(OSError):  # from file systems without locks
            entry.parent.mkdir(parents=True, exist_ok=True)
            self._file = entry.with_suffix(".lock").open("ab")
            while time.monotonic() < end:
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waited = True
                    time.sleep(0.02)
        return waited

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


one_process = _OneProcess()


class PackageCache(FunctionCache):
    """Numba's cache of a function, with this module's files."""

    class _impl_class(FunctionCache._impl_class):  # type: ignore[name-defined, misc]
        _locator_classes = (_Locator,)

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        self._cache_file = _Entries(self.cache_path, function.__name__)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled function, if there is one; if not, it is for this process to compile it: see `one_process`.

        Numba would first import all that it can compile, which takes most of the time of a warm start: machine code
        needs its memory manager alone, and a compilation imports the rest when there is one.
        """
        rtsys.initialize(context)
        found = self._load_overload(signature, context)
        entry = self._cache_file.path(self._index_key(signature, context.codegen()))
        if found is None and one_process.acquire(entry):
            found = self._load_overload(signature, context)
        return found
