"""How many threads a call uses, and when it must not use Numba's pool at all.

One thread at a time launches a parallel kernel: Numba's default threading layer ends the process otherwise.  A call
that finds the pool taken, and every call in a forked child of a process that has used the pool, runs the serial kernel,
which gives the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Iterator

import numba

SPIN_COUNT = "10000"  # some 0.1 ms

_pool = threading.Lock()
_launched = False
_orphaned = False


def count() -> int:
    """Threads that a call uses: Numba's setting for the calling thread."""
    _start()
    return int(numba.get_num_threads())


@functools.cache
def _start() -> None:
    """Start Numba's threads.

    Those of GNU OpenMP spin for milliseconds after a kernel by default, on cores that NumPy's matrix products may want
    next.  The time set here is long enough for one call after the other to find them awake, and so short that a product
    after a call is not slowed down.  The library reads it once, when it is loaded: the environment stays as it was.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        numba.get_num_threads()
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    try:
        numba.get_num_threads()
    finally:
        del os.environ["GOMP_SPINCOUNT"]


@contextlib.contextmanager
def pool() -> Iterator[bool]:
    """Whether the caller has Numba's threads for itself inside the `with` block."""
    global _launched
    mine = not _orphaned and _pool.acquire(blocking=False)
    _launched = _launched or mine
    try:
        yield mine
    finally:
        if mine:
            _pool.release()


def layer() -> str:
    """The threading layer in use or, before the first parallel call, the one that Numba would pick."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        pass
    requested = numba.config.THREADING_LAYER
    names = [requested] if requested in ("tbb", "omp", "workqueue") else numba.config.THREADING_LAYER_PRIORITY
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"numba.np.ufunc.{'workqueue' if name == 'workqueue' else name + 'pool'}")
            return str(name)
    return "none"


def _after_fork_in_child() -> None:
    global _pool, _orphaned
    _pool = threading.Lock()
    _orphaned = _launched


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
