"""How many threads a call uses, and that it leaves Numba's own setting alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from numba_attn import scaled_dot_product_attention, threads
from numba_attn.cpu import launch

X = np.random.default_rng(0).standard_normal((4, 400, 32), dtype=np.float32)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of workers of the calls that a test makes."""
    seen: list[int] = []
    slices = launch.slices

    def counted(workers: int, *rest: Any) -> Any:
        seen.append(workers)
        return slices(workers, *rest)

    monkeypatch.setattr(launch, "slices", counted)
    return seen


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one processor")
def test_limit(workers: list[int]) -> None:
    scaled_dot_product_attention(X, X, X)
    with threads.limit(1):
        scaled_dot_product_attention(X, X, X)
        with threads.limit(2):
            scaled_dot_product_attention(X, X, X)
        with threads.limit(1000):
            assert threads.count() == numba.get_num_threads()
        assert threads.count() == 1
    scaled_dot_product_attention(X, X, X)
    assert workers[1:3] == [1, 2]
    assert workers[0] == workers[3] == numba.get_num_threads()


def test_limit_is_of_a_thread_or_a_task() -> None:
    everyone = threads.count()
    with threads.limit(1), ThreadPoolExecutor(1) as executor:
        assert executor.submit(threads.count).result() == everyone

    async def limited(n: int) -> int:
        with threads.limit(n):
            await asyncio.sleep(0.01)
            return threads.count()

    async def both() -> list[int]:
        return await asyncio.gather(limited(1), limited(everyone))

    assert asyncio.run(both()) == [1, everyone]


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError), (True, TypeError)])
def test_limits_that_are_none(bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="threads must be"):
        with threads.limit(bad):
            pass


def test_limit_ends_with_an_exception() -> None:
    before = threads.count()
    with pytest.raises(ZeroDivisionError), threads.limit(1):
        _ = 1 / 0
    assert threads.count() == before


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one processor")
def test_numba_setting_is_obeyed_and_kept(workers: list[int]) -> None:
    most = numba.config.NUMBA_NUM_THREADS
    few = np.ascontiguousarray(X[:1])
    for mask in (1, most):
        numba.set_num_threads(mask)
        try:
            scaled_dot_product_attention(few, few, few)
            assert workers[-1] == mask
            assert numba.get_num_threads() == mask
        finally:
            numba.set_num_threads(most)


def test_numba_setting_after_a_call_with_fewer_threads(python: Callable[..., str]) -> None:
    """Also where the call ends by an exception in the middle."""
    script = """
import numpy as np, numba, numba_attn
from numba_attn import threads
from numba_attn.cpu import launch
x = np.ones((4, 400, 32), np.float32)
seen = []
def watched(*arguments):
    seen.append(numba.get_num_threads())
    yield from slices(*arguments)
    raise KeyboardInterrupt
slices, launch.slices = launch.slices, watched
with threads.limit(2):
    try:
        numba_attn.scaled_dot_product_attention(x, x, x)
    except KeyboardInterrupt:
        print(seen, numba.get_num_threads(), threads._pool._is_owned())
"""
    assert python(script, NUMBA_NUM_THREADS="3").strip() == "[2] 3 False"


def test_interrupted_as_it_takes_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are free again, for other threads too."""

    def interrupted() -> int:
        raise KeyboardInterrupt

    class Pool:
        """Taken, and at once there is a signal."""

        def acquire(self, blocking: bool) -> bool:
            pool.acquire(blocking)
            return interrupted() == 0

        def release(self) -> None:
            pool.release()

    pool = threads._pool
    with monkeypatch.context() as patch:
        patch.setattr(numba.config, "NUMBA_NUM_THREADS", 3)
        patch.setattr(numba, "get_num_threads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            threads.do_together(2, lambda: None)
    monkeypatch.setattr(threads, "_pool", Pool())
    with pytest.raises(KeyboardInterrupt):
        threads.do_together(2, lambda: None)
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(pool.acquire, False).result()
        executor.submit(pool.release).result()


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one processor")
def test_another_thread_has_the_workers(workers: list[int]) -> None:
    expected = scaled_dot_product_attention(X, X, X)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(threads._pool.acquire).result()
        assert np.array_equal(scaled_dot_product_attention(X, X, X), expected)
        executor.submit(threads._pool.release).result()
    scaled_dot_product_attention(X, X, X)
    assert workers[-2:] == [1, 2]


def test_environment(python: Callable[..., str]) -> None:
    count = "from numba_attn import threads; print(threads.count())"
    assert python(count, NUMBA_ATTN_NUM_THREADS="1").strip() == "1"
    assert int(python(count, NUMBA_ATTN_NUM_THREADS="1000")) == numba.config.NUMBA_NUM_THREADS
    for bad in ("0", "two", "-1", "1.5"):
        script = f"try:\n  {count}\nexcept ValueError as e:\n  print(e)"
        assert "NUMBA_ATTN_NUM_THREADS must be" in python(script.replace("; ", "\n  "), NUMBA_ATTN_NUM_THREADS=bad)


def test_affinity(python: Callable[..., str]) -> None:
    script = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, numba_attn
from numba_attn import threads
x = np.ones((4, 400, 32), np.float32)
numba_attn.scaled_dot_product_attention(x, x, x)
print(threads.count())
"""
    if not hasattr(__import__("os"), "sched_setaffinity"):
        pytest.skip("no affinity here")
    assert python(script).strip() == "1"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
        (  # The group above allows less.
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/cpu.max": "250000 100000\n",
                "sys/fs/cgroup/user/job/cpu.max": "800000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/docker/0123\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_quota_of_a_container(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._quota(tmp_path) == expected


def test_the_first_calls_at_once(python: Callable[..., str]) -> None:
    """Of many threads that all find nothing compiled or loaded: one kernel, and the same bits."""
    script = """
import threading, numpy as np, numba_attn
x = np.random.default_rng(0).standard_normal((4, 400, 32), dtype=np.float32)
results, start = [], threading.Barrier(8)
def call():
    start.wait()
    results.append(numba_attn.scaled_dot_product_attention(x, x, x))
callers = [threading.Thread(target=call) for _ in range(8)]
[c.start() for c in callers]; [c.join() for c in callers]
assert len(results) == 8 and all(np.array_equal(r, results[0]) for r in results)
from numba_attn.cpu import forward
assert len(forward.work.overloads) == 1
"""
    python(script)


def test_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tasks once, whatever a slice takes; a short call is one slice."""
    assert len(list(launch.slices(2, 1000, 1e6))) == 1
    now = [0.0]
    monkeypatch.setattr(launch.time, "perf_counter", lambda: now[0])
    for speed in (0.001, 0.1, 10.0):  # seconds a task
        done = 0
        for counters in launch.slices(2, 101, 1e12):
            assert (counters[:, 0] == done).all()
            more = int(counters[0, 1]) - done
            assert more == 1 or more * speed <= 8 * launch.SLICE_SECONDS
            now[0] += more * speed
            done += more
        assert done >= 51


def test_slices_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"is_causal": True, "return_aux": ("lse", "key_weight")}
    expected, aux = scaled_dot_product_attention(X, X, X, **options)
    monkeypatch.setattr(launch, "FIRST_SLICE", 1.0)
    monkeypatch.setattr(launch, "SLICE_SECONDS", 0.0)
    for most in (1, 2):
        with threads.limit(most):
            out, again = scaled_dot_product_attention(X, X, X, **options)
        assert np.array_equal(out, expected)
        assert np.array_equal(again.lse, aux.lse) and np.array_equal(again.key_weight, aux.key_weight)


def test_inside_a_pool_of_threads() -> None:
    """Of any kind of executor: results are right, and the setting of each thread is as it was."""
    expected = scaled_dot_product_attention(X, X, X)

    def call(_: int) -> bool:
        before = numba.get_num_threads()
        same = np.array_equal(scaled_dot_product_attention(X, X, X), expected)
        return same and numba.get_num_threads() == before

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(call, range(64)))

    async def gathered() -> list[bool]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(None, call, i) for i in range(16)))

    assert all(asyncio.run(gathered()))
    assert threading.active_count() < 64
