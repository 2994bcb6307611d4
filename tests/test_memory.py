"""What memory a call takes: no more with every call, with the number of scores or with files mapped to memory."""

from __future__ import annotations

import platform
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from tolerances import assert_accurate, same_bits

from numba_attn import scaled_dot_product_attention
from numba_attn.cpu import launch, target
from numba_attn.problem import AUX_NAMES

DTYPES = ["float32", "float64", *SIXTEEN_BITS]
MEGABYTE = 1 << 20


def operands(Lq: int, Lk: int, D: int, Dv: int, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = (2, 3, Lq, D), (2, 3, Lk, D), (2, 3, Lk, Dv)
    return tuple(rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes)


MANY_CALLS = """
import threading, numpy as np, psutil
from numba_attn import create_block_mask, scaled_dot_product_attention
rng, tables = np.random.default_rng(0), [np.ones((2, 64), np.float32) * n for n in range(3)]

def biased(table):
    return lambda score, b, h, i, j: score + table[h, (i - j) % 64]

def not_later(b, h, i, j):
    return i >= j

def call(n):
    Lq, Lk, D, Dv = (1, 17, 40, 150)[n % 4], (9, 64, 130)[n % 3], (16, 64, 33)[n % 3], (8, 64)[n % 2]
    q, k, v = (np.ones((1 + n % 2, 2, *s), "fde"[n // 7 % 3]) for s in ((Lq, D), (Lk, D), (Lk, Dv)))
    options = [
        {},
        {"is_causal": True, "window": (20, 3)},
        {"attn_mask": rng.random((Lq, Lk)) < 0.5},
        {"attn_mask": rng.random((2, Lq, Lk)), "kv_lengths": Lk // 2},
        {"softcap": 5.0, "sinks": np.ones(2), "query_offset": n},
        {"alibi_slopes": np.ones(2), "dropout_p": 0.1},
        {"out": np.empty((*q.shape[:-1], Dv), q.dtype)},
        {"return_aux": ("lse", "max_score", "entropy", "key_weight")},
        {"score_mod": biased(tables[n % 3])},
        {"mask_mod": not_later},
        {"block_mask": create_block_mask(not_later, Lq=Lq, Lk=Lk, block_size=16)},
    ][n // 12 % 11]
    if n % 50:
        scaled_dot_product_attention(q, k, v, **options)
    else:
        thread = threading.Thread(target=scaled_dot_product_attention, args=(q, k, v), kwargs=options)
        thread.start()
        thread.join()

for n in range(3000):
    call(n)
before = psutil.Process().memory_info().rss
for n in range(10_000):
    call(n)
print(psutil.Process().memory_info().rss - before)
"""


def test_calls_leak_nothing(python: Callable[..., str]) -> None:
    pytest.importorskip("psutil")
    assert int(python(MANY_CALLS)) < 2 * MEGABYTE


LONG_CALL = """
import threading, numpy as np, psutil
from numba_attn import scaled_dot_product_attention
memory = psutil.Process().memory_info
rng = np.random.default_rng(0)

def extra(L, options):
    q, k, v = (rng.standard_normal((8, L, 16), dtype=np.float32) for _ in range(3))
    out, before, most, done = np.ones_like(q), memory().rss, [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            most.append(memory().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    scaled_dot_product_attention(q, k, v, out=out, **options)
    done.set()
    watcher.join()
    return max(most), len(most)

for options in ({}, {"is_causal": True, "return_aux": ("lse", "entropy"), "softcap": 9.0, "sinks": np.ones(8)}):
    extra(512, options)
    most, times = extra(16384, options)
    assert times > 20, "not watched"
    print(most)
"""


def test_memory_of_a_long_call(python: Callable[..., str]) -> None:
    """Of what 16384 x 16384 scores of 8 heads would take, 8 GB, next to nothing, whatever the heads are like."""
    pytest.importorskip("psutil")
    assert max(map(int, python(LONG_CALL, NUMBA_NUM_THREADS="2").split())) < 16 * MEGABYTE


def allocated(*arrays: np.ndarray, **options: Any) -> int:
    """Bytes that a call has at most at once, of those that Python and NumPy allocate, in a thread that keeps none.

    On two threads, as each has working memory of its own.
    """
    out = np.empty((*arrays[0].shape[:-1], arrays[2].shape[-1]), arrays[0].dtype)

    def call() -> None:
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        scaled_dot_product_attention(*arrays, out=out, **options)

    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "window": (700, 10)},
        {"attn_mask": "bool"},
        {"attn_mask": "additive"},
        {"softcap": 3.0, "alibi_slopes": np.ones(3), "sinks": np.ones(3), "dropout_p": 0.1},
        {"score_mod": lambda score, b, h, i, j: score + 1, "mask_mod": lambda b, h, i, j: i != j},
        {"return_aux": AUX_NAMES},
    ],
    ids=lambda options: ", ".join(options) or "nothing",
)
def test_memory_does_not_depend_on_the_number_of_scores(dtype: str, options: dict[str, Any]) -> None:
    """2048 x 2048 of 6 heads: even as booleans they would take 25 MB."""
    masks = {"bool": np.ones((2048, 2048), bool), "additive": np.zeros((2048, 2048), np.float16)}
    given = {name: masks.get(x, x) if isinstance(x, str) else x for name, x in options.items()}
    arrays = operands(2048, 2048, 16, 16, dtype)
    allocated(*arrays, **given)  # compiles
    statistics = sum(2 * 3 * 2048 * 8 for _ in options.get("return_aux", ()))
    assert allocated(*arrays, **given) < 2 * MEGABYTE + statistics


def test_working_memory_is_kept() -> None:
    """The same for the next call of its kind; for another, other memory, aligned; none that is very large."""

    def lent(workers: int, size: int, dtype: Any = np.float32) -> np.ndarray:
        with launch.working_memory(workers, size, np.dtype(dtype)) as memory:
            return memory

    first = lent(2, 1000)
    assert lent(2, 1000) is first
    for workers, size, dtype in ((1, 1000, np.float32), (2, 1000, np.float64), (2, 1016, np.float32)):
        other = lent(workers, size, dtype)
        assert other.shape == (workers, size) and other.dtype == dtype and other.ctypes.data % 64 == 0
        assert lent(workers, size, dtype) is other
    size = launch.MOST_KEPT // 4 + 16
    assert lent(1, size) is not lent(1, size)
    assert lent(2, 1016) is other
    in_thread: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: in_thread.append(lent(2, 1016)))
    thread.start()
    thread.join()
    assert not np.shares_memory(in_thread[0], other)


def test_working_memory_is_lent_once() -> None:
    """What asks for as much while it is in use gets other memory."""
    kind = 2, 1000, np.dtype(np.float32)
    with launch.working_memory(*kind) as outer, launch.working_memory(*kind) as inner:
        assert not np.shares_memory(outer, inner)
    with launch.working_memory(*kind) as again:
        assert again is outer or again is inner


def test_what_is_kept_of_large_batches() -> None:
    """Nothing: of a hundred thousand sequences, tables take megabytes."""
    tracemalloc.start()
    try:
        for B in range(20_000, 20_006):
            x = np.zeros((B, 1, 1, 1), np.float32)
            scaled_dot_product_attention(x, x, x)
            del x
        assert tracemalloc.get_traced_memory()[0] < MEGABYTE
    finally:
        tracemalloc.stop()


MAPPED_FILE = """
import math, resource, sys
import numpy as np
from pathlib import Path
from numba_attn import scaled_dot_product_attention

def mapped(dtype, shape):
    Path(sys.argv[1]).unlink(missing_ok=True)
    array = np.memmap(sys.argv[1], dtype, "w+", shape=shape)
    array[:, ::1000] = 1
    array.flush()
    return np.memmap(sys.argv[1], dtype, "r", shape=shape)

def check(few=None):
    for query, key in inputs:
        out = scaled_dot_product_attention(query, key[:, :few], key[:, :few])
        weight = math.ceil(key[:, :few].shape[1] / 1000) * math.exp(math.sqrt(128))
        others = key[:, :few].shape[1] * 999 // 1000
        np.testing.assert_allclose(out, weight / (weight + others), rtol=2e-3)
    out = scaled_dot_product_attention(*(x[:, :few] for x in masked), mask[:, :few])
    assert (out == 1).all()

inputs = []
for dtype in (np.float32, np.float16):
    length = (200 << 20) // 128 // np.dtype(dtype).itemsize // 1000 * 1000
    inputs.append((np.ones((1, 20, 128), dtype), mapped(dtype, (1, length, 128))))
mask = mapped(bool, (2000, 100_000))
masked = np.ones((1, 2000, 1), np.float32), np.ones((1, 100_000, 1), np.float32), np.zeros((1, 100_000, 1), np.float32)
masked[2][:, ::1000] = 1
check(2000)

used = Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]
resource.setrlimit(resource.RLIMIT_DATA, ((int(used) << 10) + (64 << 20), -1))
try:
    np.ones(200 << 20, np.uint8)
except MemoryError:
    print("limited")
check()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_mapped_files_larger_than_memory(python: Callable[..., str], tmp_path: Path) -> None:
    """Keys, values or a mask of 200 MB in a file, with 64 MB of memory left: none of them is ever copied."""
    if python(MAPPED_FILE, str(tmp_path / "file"), NUMBA_NUM_THREADS="2").strip() != "limited":
        pytest.skip("the limit is not kept here")


# Numbers too small to be normal ---------------------------------------------------------------------------------------


@intrinsic
def set_control_register(context: Any, value: types.Integer) -> Any:
    """MXCSR, which each thread of an x86 processor has of its own."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        slot = builder.alloca(ir.IntType(32))
        builder.store(builder.trunc(values[0], ir.IntType(32)), slot)
        kind = ir.FunctionType(ir.VoidType(), [slot.type])
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse.ldmxcsr", (), kind), [slot])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@numba.njit
def flush_to_zero(flush: bool) -> None:
    set_control_register(0x9FC0 if flush else 0x1F80)


def in_thread(flush: bool, arrays: tuple[np.ndarray, ...], options: dict[str, Any]) -> Any:
    """The results of a call by a thread that takes subnormal numbers for zeros, if `flush`, and does all by itself."""
    results: list[Any] = []
    tiny = np.full(4, 1e-40, np.float32)

    def call() -> None:
        numba.set_num_threads(1)
        flush_to_zero(flush)
        results.append((tiny * np.float32(1)).any())
        results.append(scaled_dot_product_attention(*arrays, return_aux=AUX_NAMES, **options))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    subnormal, result = results
    assert subnormal == (not flush)
    return result


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a register of x86 processors")
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers(dtype: str) -> None:
    """Results are the same with and without them, as other libraries may switch them off for some threads.

    Those of tiny numbers, which are then taken for zeros, are as exact as results of larger ones.
    """
    query, key, value = operands(40, 300, 16, 17, dtype)
    mask = np.random.default_rng(1).standard_normal((40, 300)).astype(query.dtype)
    some = [
        {},
        {"is_causal": True},
        {"scale": 2.0},
        {"scale": 30.0},
        {"attn_mask": mask, "softcap": 60.0, "scale": 9.0},
    ]
    some += [{"alibi_slopes": np.array([0.5, 1.0, 9.0]), "sinks": np.array([90.0, -90.0, 0.0])}]
    some += [{"dropout_p": 0.3, "dropout_seed": 0, "scale": 5.0}]
    for options in some:
        flushed, kept = (in_thread(flush, (query, key, value), options) for flush in (True, False))
        assert same_bits(flushed, kept), options
    tiny = np.array(np.finfo(np.float32 if dtype == "bfloat16" else query.dtype).tiny / 8).astype(query.dtype)
    for arrays in (
        (query * tiny, key * tiny, value),
        (query, key, value * tiny),
        tuple(tiny * x for x in (query, key, value)),
    ):
        flushed, kept = (in_thread(flush, arrays, {}) for flush in (True, False))
        assert_accurate(*flushed, *arrays)
        assert_accurate(*kept, *arrays)
        if dtype == "float16" and target.HAS_F16C:
            assert same_bits(flushed, kept), "its subnormal numbers are normal ones of float32"
