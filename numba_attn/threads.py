"""How many threads a call uses, and when it must not use Numba's pool at all.

One thread at a time launches a parallel kernel: Numba's default threading layer ends the process otherwise.  A call
that finds the pool taken, and every call in a forked child of a process that has used the pool, does all on the thread
that makes it, to the same bits.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import os
import site
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numba

SPIN_COUNT = "10000"  # some 0.1 ms

# Re-entrant: a signal handler may make a call between two slices of another, when Numba's threads have nothing to do.
_pool = threading.RLock()
_launched = False
_orphaned = False
_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("numba_attn.threads.limit", default=None)


def count() -> int:
    """Threads that a call uses, at most.

    The least of Numba's setting for the calling thread, which counts the processors that the process may run on when it
    starts; `NUMBA_ATTN_NUM_THREADS`; the processor time that a container may use; and `limit`.
    """
    most = _most_of_the_process()
    limited = _limit.get()
    return min(most, int(numba.get_num_threads()), most if limited is None else limited)


@contextlib.contextmanager
def limit(threads: int) -> Iterator[None]:
    """Use no more than so many threads for calls inside the `with` block, of this Python thread or asyncio task.

    Raises ValueError or TypeError for what is not an integer of 1 or more.

    >>> with limit(1):
    ...     count()
    1
    """
    token = _limit.set(_positive("threads", threads))
    try:
        yield
    finally:
        _limit.reset(token)


def _positive(name: str, threads: object) -> int:
    if isinstance(threads, bool) or not hasattr(type(threads), "__index__"):
        raise TypeError(f"{name} must be an integer, got {threads!r}")
    number = int(threads)  # type: ignore[call-overload]
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}")
    return int(number)


@functools.cache
def _most_of_the_process() -> int:
    """What the environment and the container allow; starts Numba's threads.

    Those of GNU OpenMP spin for milliseconds after a kernel by default, on cores that NumPy's matrix products may want
    next.  The time set here is long enough for one call after the other to find them awake, and so short that a product
    after a call is not slowed down.  The library reads it once, when it is loaded: the environment stays as it was.
    """
    wanted = os.environ.get("NUMBA_ATTN_NUM_THREADS")
    if wanted and not wanted.strip().lstrip("+-").isdecimal():
        raise ValueError(f"NUMBA_ATTN_NUM_THREADS must be an integer, got {wanted!r}")
    most = _positive("NUMBA_ATTN_NUM_THREADS", int(wanted)) if wanted else int(numba.config.NUMBA_NUM_THREADS)
    _load_tbb()
    spins = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if not spins:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    try:
        numba.get_num_threads()
    finally:
        if not spins:
            del os.environ["GOMP_SPINCOUNT"]
    return min(most, _quota(Path("/")) or most)


@functools.cache
def _load_tbb() -> None:
    """Load TBB from where pip installs it, if it has; Numba's layer of that name only looks where the system does."""
    for prefix in (sys.prefix, site.getuserbase()):
        for name in ("libtbb.so.12", "libtbb.12.dylib"):
            library = Path(prefix) / "lib" / name
            if library.exists():
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _quota(root: Path) -> int | None:
    """Processors' worth of time that the control groups of this process may use, in whole ones but at least 1.

    Of Linux: version 2 says "<quota> <period>", or "max", in cpu.max; version 1 has a file for each.  A group may not
    use more than those above it.  In a container, the group is often mounted as if it were the topmost.
    """
    least: float | None = None
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
                continue
            mounted = root / "sys/fs/cgroup" / controllers
            groups = [mounted, *(mounted / part for part in _paths(path))]
            for allowed in filter(None, map(_allowed, groups)):
                least = allowed if least is None else min(least, allowed)
    return None if least is None else max(1, int(least))


def _paths(group: str) -> list[str]:
    """A control group and those above it."""
    names = [name for name in group.split("/") if name not in ("", "..")]
    return ["/".join(names[: i + 1]) for i in range(len(names))]


def _allowed(group: Path) -> float | None:
    """Processors' worth of time of one control group; None where there is no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def do_together(workers: int, work: Callable[[], None]) -> bool:
    """Do some work for which the caller has `workers` of Numba's threads for itself; False if it cannot have them.

    The number of threads that Numba is set to, for the calling thread, is the same afterwards.
    """
    global _launched
    if workers < 2 or _orphaned:
        return False
    before = workers
    # No context manager: one of Python takes as long as a small problem, and after any call of its own may come the
    # exception of a signal, Ctrl-C for one, with the pool taken for good.  Here what gives it back always comes first.
    try:
        if not _pool.acquire(blocking=False):
            return False
        _launched = True
        if workers < numba.config.NUMBA_NUM_THREADS:
            before = numba.get_num_threads()
        try:
            if workers < before:
                numba.set_num_threads(workers)
            work()
        finally:
            if workers < before:
                numba.set_num_threads(before)
    finally:
        try:  # noqa: SIM105, see above
            _pool.release()
        except RuntimeError:
            pass  # another thread has it
    return True


def layer() -> str:
    """The threading layer in use or, before the first parallel call, the one that Numba would pick."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        _load_tbb()
    requested = numba.config.THREADING_LAYER
    names = [requested] if requested in ("tbb", "omp", "workqueue") else numba.config.THREADING_LAYER_PRIORITY
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"numba.np.ufunc.{'workqueue' if name == 'workqueue' else name + 'pool'}")
            return str(name)
    return "none"


def _after_fork_in_child() -> None:
    """Numba's threads are the parent's; GNU OpenMP ends a child that wants some, whoever had them started there."""
    global _orphaned
    try:
        started = numba.threading_layer()
    except ValueError:
        started = None
    _orphaned = _launched or started == "omp"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
