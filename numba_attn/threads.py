"""How many threads a call uses, and when it must not use Numba's pool at all.

One thread at a time launches a parallel kernel: Numba's default threading layer ends the process otherwise.  A call
that finds the pool taken, and every call in a forked child of a process that has used the pool, runs the serial kernel,
which gives the same bits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator

import numba

_pool = threading.Lock()
_launched = False
_orphaned = False


def count() -> int:
    """Threads that a call uses: Numba's setting for the calling thread."""
    return int(numba.get_num_threads())


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
