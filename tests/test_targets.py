"""What depends on the processor: every instruction set that code can be compiled for, each in its own interpreter."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import SIXTEEN_BITS

from numba_attn.cpu import target

# A smoke test of every kind of stage, in the types named as arguments: full and ragged tiles, masks of each kind, odd
# strides, poison, and what changes scores, probabilities and results; sums over rows, a kernel of their own, in the
# first of the types.
SMOKE = """
import importlib, itertools, sys
import numpy as np
from numba_attn import scaled_dot_product_attention, threads
from numba_attn.cpu import target

LARGEST = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 0.04}

def check(*arrays, **options):
    results, exact = (scaled_dot_product_attention(*arrays, backend=b, **options) for b in ("cpu", "reference"))
    pairs = [(results, exact)] if "return_aux" not in options else [(results[0], exact[0]), *zip(results[1], exact[1])]
    for got, wanted in pairs:
        if got is not None:
            got, wanted = got.astype(np.float64), wanted.astype(np.float64)
            assert np.array_equal(np.isfinite(got), np.isfinite(wanted))
            with np.errstate(invalid="ignore"):
                error = np.nanmax(np.where(got == wanted, 0, abs(got - wanted) / np.maximum(1, abs(wanted))))
            assert error < LARGEST[name], (name, error, arrays[0].shape, options)
    return results

rng = np.random.default_rng(0)
for name in sys.argv[1:]:
    if name == "bfloat16":
        importlib.import_module("ml_dtypes")
    dtype = np.dtype(name)
    everything = {
        "is_causal": True, "query_offset": 9, "window": (40, 3), "softcap": 4.0, "sinks": np.array([0.5, -1.0, 2.0]),
        "alibi_slopes": np.array([0.5, 0.0, 0.1]), "dropout_p": 0.2, "dropout_seed": 1,
        "return_aux": ("lse", "max_score", "entropy", *(["key_weight"] if name == sys.argv[1] else [])),
    }
    for Lq, Lk, D, Dv in ((70, 300, 33, 20), (5, 64, 64, 64), (1, 9, 3, 1)):
        q, k, v = (rng.standard_normal((2, 3, *s)).astype(dtype) for s in ((Lq, D), (Lk, D), (Lk, Dv)))
        kept, added = rng.random((Lq, Lk)) < 0.5, rng.standard_normal((Lq, Lk)).astype(dtype)
        masks = [None, kept, added, kept.T.copy().T]
        check(q, k, v, **everything)
        check(q, k, v, added, **everything)
        for mask, causal, k in itertools.product(masks, (False, True), (k, np.asfortranarray(k))):
            out = check(q, k, v, mask, is_causal=causal)
            v[:, :, -1] = np.nan
            if causal and Lk > Lq:
                again = scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
                assert again.tobytes() == out.tobytes()
            v[:, :, -1] = 0.5
print(target.ISA, target.VECTOR_BYTES, threads.layer())
"""

# After that, where nothing had been compiled before: what is large has been compiled once for the types of a kernel.
# Where an argument is a literal in one place, and in another not, it would be twice.
COMPILED_ONCE = """
from numba.core.types import Literal
from numba_attn.cpu import decode, forward
for part in (forward.attend, forward.exponentiate_tile, decode.attend):
    assert part.overloads
    assert not [kinds for kinds in part.overloads if any(isinstance(kind, Literal) for kind in kinds)], part
"""


def force(name: str, form: str, own: str, elsewhere: Path) -> dict[str, str]:
    """The environment of a process that is to use a form of kernels: compiled `elsewhere`, if it is not one's own."""
    return {name: form, **({} if form == own else {"NUMBA_CACHE_DIR": str(elsewhere)})}


X86 = platform.machine() in ("x86_64", "AMD64")
DTYPES = ["float32", "float64", *SIXTEEN_BITS]


def has(feature: str) -> bool:
    try:
        return feature in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


AVX2 = "+avx,+avx2,+fma,+f16c"
AVX512 = f"{AVX2},+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd"
# Name and features for Numba, what the processor at hand must have, and the register tile that must come of it.
LADDER = {
    "generic": ("", "", "generic"),
    "x86-64-v2": ("+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt", "sse4_2", "generic"),
    "haswell": (AVX2, "avx2", "avx2"),
    "skylake-avx512": (AVX512, "avx512vl", "avx512"),
}
# One type each, as every one is a kernel of its own to compile; the slow tests have the others.
FIRST = {"generic": "float64", "x86-64-v2": "float32", "haswell": "float32", "skylake-avx512": "bfloat16"}
SLOW = pytest.param(False, marks=pytest.mark.slow)


def features_of(name: str) -> str:
    """For Numba; skips what this processor cannot run."""
    features, needs, _ = LADDER[name]
    if needs and not has(needs):
        pytest.skip(f"this processor has no {needs}")
    return features


@pytest.mark.skipif(not X86, reason="names of x86 processors")
@pytest.mark.parametrize("first", [True, SLOW], ids=["one type", "the others"])
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x == "x86-64-v2" else x for x in LADDER])
def test_instruction_sets(python: Callable[..., str], tmp_path: Path, name: str, first: bool) -> None:
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features_of(name), "NUMBA_CACHE_DIR": str(tmp_path)}
    dtypes = [dtype for dtype in DTYPES if (dtype == FIRST[name]) is first]
    assert python(SMOKE + COMPILED_ONCE, *dtypes, **environment).split()[0] == LADDER[name][2]


def test_instruction_set_of_this_processor(python: Callable[..., str]) -> None:
    python(SMOKE, *DTYPES)


@pytest.mark.parametrize("dtypes", [["float32"], pytest.param(DTYPES[1:], marks=pytest.mark.slow)])
def test_wide_vectors_on_any_processor(python: Callable[..., str], tmp_path: Path, dtypes: list[str]) -> None:
    """The AVX-512 form is right, if slow, without AVX-512."""
    printed = python(SMOKE, *dtypes, **force("NUMBA_ATTN_ISA", "avx512", target.ISA, tmp_path))
    assert printed.split()[:2] == ["avx512", "64"]


# OpenMP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def openmp(python: Callable[..., str]) -> Callable[..., None]:
    """Run a script on that threading layer."""
    if python("from numba_attn import threads; print(threads.layer())", NUMBA_THREADING_LAYER="omp").strip() != "omp":
        pytest.skip("omp is not installed")

    def run(script: str, *dtypes: str, **environment: str) -> None:
        assert python(script, *dtypes, NUMBA_THREADING_LAYER="omp", **environment).split()[2] == "omp"

    return run


def test_small_stacks(openmp: Callable[..., None]) -> None:
    """Of 100 kB for each worker: tiles are not on the stack."""
    openmp(SMOKE, *DTYPES, OMP_STACKSIZE="100K")


TORCH = "import torch\nx = torch.ones(700, 700)\nfor _ in range(20):\n    y = torch.softmax(x @ x, 0)\n"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("script", [TORCH + SMOKE, SMOKE + TORCH + SMOKE], ids=["before", "after"])
def test_another_openmp_runtime(openmp: Callable[..., None], script: str) -> None:
    """PyTorch brings one of its own, with threads that are in use before and between calls."""
    openmp(script, "float32")


# Machine code ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not X86, reason="names of x86 processors")
@pytest.mark.parametrize(("register", "multiply_adds"), [("zmm", 24), ("ymm", 12)], ids=["avx512", "avx2"])
def test_accumulators_stay_in_registers(
    python: Callable[..., str], tmp_path: Path, register: str, multiply_adds: int
) -> None:
    """Compiled for another processor, though not run: the product loops use whole registers and spill none."""
    script = f"""
import re
register, multiply_adds = {register!r}, {multiply_adds}
from numba import types
from numba_attn.cpu import forward
forward.work.compile(forward.signature("f", types.float32, "f"))
text = "".join(forward.work.inspect_asm().values())
loops = re.findall(r"\\n(\\.LBB\\w+):((?:(?!\\n\\.LBB).)*?)\\n\\tj\\w+\\t\\1", text, re.S)
products = [
    body for _, body in loops
    if body.count("vbroadcastss") >= 4 and len(re.findall(rf"vfmadd\\w+ps.*{{register}}", body)) >= multiply_adds
]
assert products, "no product loop"
in_memory = rf"{{register}}.*rsp|rsp.*{{register}}"
assert not any(re.search(in_memory, body) for body in products), "an accumulator in memory"
print(len(products))
"""
    name, features = {"zmm": ("skylake-avx512", AVX512), "ymm": ("haswell", AVX2)}[register]
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
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

# A block mask that ends at an odd key, beyond which values may be anything: nobody attends to the keys from 32 on.
shapes = (1, 2, 30, 16), (1, 2, 40, 16), (1, 2, 40, 16)
clean = [rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in shapes]
poisoned = [x.copy() for x in clean]
poisoned[1][:, :, 32:] = poisoned[2][:, :, 32:] = np.nan
prefix = lambda b, h, i, j: j < 11 or (j <= i + 2 and j + 20 >= i)
block_mask = numba_attn.create_block_mask(prefix, Lq=30, Lk=40, block_size=(13, 7))
for dtype in (ml_dtypes.bfloat16, np.float32):
    expected, out = (
        numba_attn.scaled_dot_product_attention(
            *(x.astype(dtype) for x in given), block_mask=block_mask, precision="bfloat16"
        )
        for given in (clean, poisoned)
    )
    assert not np.isnan(out).any()
    assert out.tobytes() == expected.tobytes()
print(target.BFLOAT16, max(errors))
"""


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="names of x86 processors")
@pytest.mark.parametrize("products", ["dot", "amx"])
def test_bfloat16_compiles_on_any_processor(python: Callable[..., str], tmp_path: Path, products: str) -> None:
    """Also where this one could not run them."""
    script = """
from numba_attn.cpu import decode, forward, key_weight, narrow, target
from numba_attn.cpu.simd import PAIRS
assert narrow.operand("bfloat16", True) == PAIRS
forward.work.compile(forward.signature("bfloat16", PAIRS, "bfloat16"))
forward.work.compile(forward.signature("f", PAIRS, "f"))
key_weight.weigh.compile(key_weight.signature("bfloat16", PAIRS, "bfloat16"))
if target.BFLOAT16 == "dot":
    decode.decode.compile(decode.signature("bfloat16", PAIRS, "bfloat16"))
dots = "tdpbf16ps" if target.BFLOAT16 == "amx" else "vdpbf16ps"
for kernel in (forward.work, key_weight.weigh, *([decode.decode] if target.BFLOAT16 == "dot" else [])):
    for text in kernel.inspect_asm().values():
        assert dots in text, kernel
"""
    name, features = {
        "dot": ("znver4", f"{AVX512},+avx512bf16"),
        "amx": ("sapphirerapids", f"{AVX512},+avx512bf16,+amx-tile,+amx-bf16"),
    }[products]
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    python(script, **environment, NUMBA_ATTN_BFLOAT16=products)


INTEGERS = """
import numpy as np, numba_attn
from numba_attn.cpu import decode
from numba_attn.cpu.simd import WORDS
from numba_attn.storage import dequantize
rng = np.random.default_rng(0)
assert decode.operand("float16", False, "int8") == decode.operand("f", True, "int4") == WORDS
for numbers, D, Dv in (("int8", 40, 72), ("int8", 64, 20), ("int4", 104, 72)):
    cache = numba_attn.KVCache(2, 2, 300, D, Dv, dtype=np.float16, quantize=numbers)
    cache.append(*(rng.standard_normal((2, 2, 300, size)).astype(np.float16) for size in (D, Dv)), [300, 131])
    for heads, rows in ((2, 1), (6, 1), (4, 5), (16, 1)):
        query = rng.standard_normal((2, heads, rows, D)).astype(np.float16)
        held = [dequantize(x, numbers, size).astype(np.float64) for x, size in ((cache.key, D), (cache.value, Dv))]
        exact = numba_attn.scaled_dot_product_attention(
            query.astype(np.float64), *map(np.nan_to_num, held), is_causal=True, query_offset=cache.lengths - rows,
            kv_lengths=cache.lengths, enable_gqa=True, backend="reference",
        )
        out = numba_attn.attention_with_kv_cache(query, cache)
        assert np.abs(out - exact).max() < 1e-3
assert "vpmaddwd" in next(iter(decode.decode.inspect_asm().values()))
"""


@pytest.mark.skipif(not X86, reason="names of x86 processors")
@pytest.mark.parametrize("name", ["haswell", pytest.param("skylake-avx512", marks=pytest.mark.slow)])
def test_products_of_integers(python: Callable[..., str], tmp_path: Path, name: str) -> None:
    """By the instruction that these processors have; this one may have a faster one, which other tests use."""
    python(INTEGERS, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features_of(name), NUMBA_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize("products", ["widened", "dot", "amx"])
def test_products_of_bfloat16(python: Callable[..., str], tmp_path: Path, products: str) -> None:
    """Every way of making them that this processor has."""
    pytest.importorskip("ml_dtypes")
    if {"widened": False, "dot": not has("avx512_bf16"), "amx": not has("amx_bf16")}[products]:
        pytest.skip(f"this processor has no {products}")
    environment = force("NUMBA_ATTN_BFLOAT16", products, target.BFLOAT16, tmp_path)
    name, error = python(BFLOAT16, **environment).split()
    assert name == products
    assert float(error) < 0.04
