"""What depends on the process: instruction sets, caches, forks; each in its own interpreter, with a time limit."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

# A smoke test of every kind of stage: full and ragged tiles, masks of each kind, both types, odd strides.
SMOKE = """
import itertools, numpy as np, numba_attn
from numba_attn.cpu import target
rng = np.random.default_rng(0)
for dtype, atol in ((np.float32, 1e-5), (np.float64, 1e-12)):
    for Lq, Lk, D, Dv in ((70, 300, 33, 20), (5, 64, 64, 64), (1, 9, 3, 1)):
        q, k, v = (rng.standard_normal((2, 3, *s)).astype(dtype) for s in ((Lq, D), (Lk, D), (Lk, Dv)))
        kept, added = rng.random((Lq, Lk)) < 0.5, rng.standard_normal((Lq, Lk)).astype(dtype)
        masks = [None, kept, added, kept.T.copy().T]
        for mask, causal, k in itertools.product(masks, (False, True), (k, np.asfortranarray(k))):
            out, exact = (
                numba_attn.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, backend=b)
                for b in ("cpu", "reference")
            )
            assert abs(out - exact).max() < atol, (dtype, Lq, causal, abs(out - exact).max())
            v[:, :, -1] = np.nan
            if causal and Lk > Lq:
                again = numba_attn.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
                assert np.array_equal(again, out)
            v[:, :, -1] = 0.5
print(target.ISA, target.VECTOR_BYTES)
"""

X86 = platform.machine() in ("x86_64", "AMD64")


def has(feature: str) -> bool:
    try:
        return feature in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


@pytest.mark.skipif(not X86, reason="names of x86 processors")
@pytest.mark.parametrize(
    ("name", "features", "needs", "isa"),
    [
        ("generic", "", "", "generic"),
        ("nehalem", "+sse4.2", "sse4_2", "generic"),
        ("haswell", "+avx,+avx2,+fma", "avx2", "avx2"),
        ("skylake-avx512", "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd", "avx512vl", "avx512"),
    ],
)
def test_instruction_sets(
    python: Callable[..., str], tmp_path: Path, name: str, features: str, needs: str, isa: str
) -> None:
    if needs and not has(needs):
        pytest.skip(f"this processor has no {needs}")
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert python(SMOKE, **environment).split()[0] == isa


def test_wide_vectors_on_any_processor(python: Callable[..., str], tmp_path: Path) -> None:
    """The AVX-512 form is right, if slow, without AVX-512."""
    assert python(SMOKE, NUMBA_ATTN_ISA="avx512", NUMBA_CACHE_DIR=str(tmp_path)).split() == ["avx512", "64"]


@pytest.mark.skipif(not X86, reason="names of x86 processors")
def test_avx512_code_keeps_its_accumulators_in_registers(python: Callable[..., str], tmp_path: Path) -> None:
    """Compiled for a processor with AVX-512, though not run: the product loops use 512-bit registers and spill none."""
    script = """
import re
from numba import types
from numba_attn.cpu import forward
forward.work.compile(forward._signature("f", types.float32))
text = "".join(forward.work.inspect_asm().values())
loops = re.findall(r"\\n(\\.LBB\\w+):((?:(?!\\n\\.LBB).)*?)\\n\\tj\\w+\\t\\1", text, re.S)
products = [
    body for _, body in loops if body.count("vbroadcastss") >= 4 and len(re.findall(r"vfmadd\\w+ps.*zmm", body)) >= 24
]
assert products, "no product loop"
assert not any(re.search(r"zmm.*rsp|rsp.*zmm", body) for body in products), "an accumulator in memory"
print(len(products))
"""
    features = "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd"
    environment = {"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert int(python(script, **environment)) >= 2


BFLOAT16 = """
import numpy as np, ml_dtypes, numba_attn
from numba_attn.cpu import target
rng = np.random.default_rng(0)
shapes = (2, 3, 150, 40), (2, 3, 131, 40), (2, 3, 131, 25)
arrays = [rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in shapes]
options = [{}, {"is_causal": True, "query_offset": -3}, {"window": (7, 5), "dropout_p": 0.2, "dropout_seed": 1}]
errors = []
for given in (arrays, [x.astype(np.float32) for x in arrays]):
    for more in options:
        more = {**more, "precision": "bfloat16"}
        out, exact = (numba_attn.scaled_dot_product_attention(*given, backend=b, **more) for b in ("cpu", "reference"))
        errors.append(float(np.abs(out.astype(float) - exact.astype(float)).max()))
        arrays_with_nan = [x.copy() for x in given]
        arrays_with_nan[2][:, :, 70] = np.nan
        out = numba_attn.scaled_dot_product_attention(*arrays_with_nan, **more)
        exact = numba_attn.scaled_dot_product_attention(*arrays_with_nan, backend="reference", **more)
        assert np.array_equal(np.isnan(out), np.isnan(exact))
print(target.BFLOAT16, max(errors))
"""


@pytest.mark.parametrize("products", ["widened", "dot", "amx"])
def test_products_of_bfloat16(python: Callable[..., str], tmp_path: Path, products: str) -> None:
    """Every way of making them that this processor has."""
    pytest.importorskip("ml_dtypes")
    if {"widened": False, "dot": not has("avx512_bf16"), "amx": not has("amx_bf16")}[products]:
        pytest.skip(f"this processor has no {products}")
    environment = {"NUMBA_ATTN_BFLOAT16": products, "NUMBA_CACHE_DIR": str(tmp_path)}
    name, error = python(BFLOAT16, **environment).split()
    assert name == products
    assert float(error) < 0.04


CALL = """
import numpy as np, numba_attn
x = np.random.default_rng(0).standard_normal((4, 300, 32), dtype=np.float32)
print(float(np.abs(numba_attn.scaled_dot_product_attention(x, x, x)).sum()))
"""


def test_cache_is_used_and_keyed_on_the_sources(python: Callable[..., str], tmp_path: Path) -> None:
    cold = python(CALL, NUMBA_CACHE_DIR=str(tmp_path))
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nb?")}
    assert len(files) >= 2
    assert python(CALL, NUMBA_CACHE_DIR=str(tmp_path)) == cold
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nb?")} == files, "compiled again"
    stale = "import numba_attn.cpu.jit as jit; jit.fingerprint = lambda: 'another version'\n"
    assert python(stale + CALL, NUMBA_CACHE_DIR=str(tmp_path)) == cold
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nbi")} != files, "used what other sources compiled"


def test_no_writable_cache(python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    script = "from numba_attn.cpu import jit\nassert jit.cache_directory() is None\n" + CALL
    python(script, NUMBA_CACHE_DIR=str(tmp_path / "file"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use(python: Callable[..., str]) -> None:
    """A child, and its child, of a process that has computed: the same bits, no hang, no signal."""
    script = """
import os, warnings, numpy as np, numba_attn
warnings.simplefilter("ignore")  # newer Python warns of any fork with threads
x = np.random.default_rng(0).standard_normal((4, 400, 32), dtype=np.float32)
attention = lambda: numba_attn.scaled_dot_product_attention(x, x, x)
expected = attention()
def child(depth):
    pid = os.fork()
    if pid == 0:
        same = np.array_equal(attention(), expected)
        os._exit((0 if same else 1) or (child(depth - 1) if depth else 0))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert child(1) == 0
assert np.array_equal(attention(), expected)
"""
    python(script, timeout=60)


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_threading_layers(python: Callable[..., str], layer: str) -> None:
    """Python threads that call at once, the very first call included, on each layer that is installed."""
    script = """
import sys, threading, numpy as np, numba, numba_attn
from numba_attn import threads
try:
    chosen = threads.layer()
except ValueError:
    chosen = None
if chosen != sys.argv[1]:
    print("missing"); raise SystemExit
x = np.random.default_rng(0).standard_normal((4, 400, 32), dtype=np.float32)
results = []
def call():
    for _ in range(10): results.append(numba_attn.scaled_dot_product_attention(x, x, x))
callers = [threading.Thread(target=call) for _ in range(8)]
[c.start() for c in callers]; [c.join() for c in callers]
assert len(results) == 80 and all(np.array_equal(r, results[0]) for r in results)
assert numba.threading_layer() == sys.argv[1]
print("right")
"""
    if python(script, layer, NUMBA_THREADING_LAYER=layer).strip() == "missing":
        pytest.skip(f"{layer} is not installed")
