"""A call touches no memory but that of its arrays: canaries around what it writes, forbidden pages around all."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from cases import SIXTEEN_BITS, SMALL, Case, dtype_of
from tolerances import same_bits

import numba_attn
from numba_attn import scaled_dot_product_attention
from numba_attn.cpu import launch
from numba_attn.problem import AUX_NAMES

PACKAGE = Path(numba_attn.__file__).parent
# The modules that make arrays for a call.
MODULES = [
    importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    for path in (PACKAGE / "problem.py", *(PACKAGE / "cpu").glob("*.py"))
    if "np.empty(" in path.read_text(encoding="utf-8")
]
DTYPES = ["float32", "float64", *SIXTEEN_BITS]
CANARY = 0xFF  # NaN, in numbers of any size


def operands(Lq: int, Lk: int, D: int, Dv: int, dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (2, 3, Lq, D), (2, 3, Lk, D), (2, 3, Lk, Dv)
    return [rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


def embedded(shape: tuple[int, ...], dtype: np.dtype, margins: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    """An array inside of a larger one, its `base`, of canaries: with so much around it on each axis, and steps."""
    whole = np.full([n * abs(s) + 2 * m for n, m, s in zip(shape, margins, steps, strict=True)], CANARY, "u1")
    whole = np.repeat(whole, dtype.itemsize, axis=-1).view(dtype)
    inner = whole[tuple(slice(m, m + n * abs(s)) for n, m, s in zip(shape, margins, steps, strict=True))]
    return inner[tuple(slice(None, None, s) for s in steps)]


def assert_canaries(inside: np.ndarray) -> None:
    """Nothing but the array's own elements has been written to."""
    owner = inside.base
    while owner.base is not None:
        owner = owner.base
    inside.view(f"u{inside.itemsize}")[...] = int.from_bytes(bytes([CANARY]) * inside.itemsize, "little")
    assert (owner.view("u1") == CANARY).all()


FORMS = {
    "rows and all": ((0, 1, 0, 0), (1, 1, 1, 1)),
    "apart": ((1, 1, 2, 5), (1, 1, 1, 1)),
    "elements apart": ((0, 0, 1, 7), (1, 1, 2, 3)),
    "backwards": ((0, 0, 1, 7), (1, -1, -2, -1)),
}


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_surrounds_out_is_not_touched(dtype: str, form: str, layout: str) -> None:
    for Lq, Dv in itertools.product((1, 5, 17, 49), (1, 3, 17, 33)):
        arrays = [np.swapaxes(x, 1, 2) if layout == "BLHD" else x for x in operands(Lq, 20, 8, Dv, dtype)]
        for options in ({}, {"query_lengths": Lq // 2}, {"is_causal": True, "dropout_p": 0.5, "dropout_seed": 0}):
            expected = scaled_dot_product_attention(*arrays, layout=layout, **options)
            out = embedded(expected.shape, expected.dtype, *FORMS[form])
            scaled_dot_product_attention(*arrays, layout=layout, out=out, **options)
            assert same_bits(out, expected), (Lq, Dv)
            assert_canaries(out)


class Surrounded:
    """NumPy, but `empty` makes arrays with canaries before and after."""

    def __init__(self) -> None:
        self.made: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        shape, dtype = tuple(np.atleast_1d(shape)), np.dtype(dtype)
        flat = embedded((math.prod(shape),), dtype, (64,), (1,))
        self.made.append(flat.reshape(shape))
        return self.made[-1]


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_surrounds_other_arrays_is_not_touched(dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that a call makes: its results, and what it needs in between.  Nor is what was in them used."""
    for Lq, Lk in itertools.product((1, 5, 17, 49), (1, 7, 48, 49, 100)):
        arrays = [np.swapaxes(x, 1, 2) if layout == "BLHD" else x for x in operands(Lq, Lk, 8, 8, dtype)]
        for options in ({}, {"query_lengths": Lq // 2, "kv_lengths": Lk // 2}, {"window": (5, 2)}):
            expected = scaled_dot_product_attention(*arrays, layout=layout, return_aux=AUX_NAMES, **options)
            surrounded = Surrounded()
            with monkeypatch.context() as patch:
                for module in MODULES:
                    patch.setattr(module, "np", surrounded)
                results = scaled_dot_product_attention(*arrays, layout=layout, return_aux=AUX_NAMES, **options)
            assert same_bits(results, expected), (Lq, Lk)
            assert len(surrounded.made) >= 5
            for x in surrounded.made:
                assert_canaries(x)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_working_memory(case: Case, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker finds in its memory changes no bit, and what lies around it is not touched."""
    arrays, options = case.arrays(), case.keywords()
    expected = scaled_dot_product_attention(*arrays, return_aux=AUX_NAMES, **options)
    for fill in (0x00, 0x7F, 0xFF):  # zeros, large numbers, NaN
        made = []

        def memory(workers: int, size: int, dtype: np.dtype) -> contextlib.AbstractContextManager[np.ndarray]:
            length, margin = workers * size * dtype.itemsize, 1 << 16
            buffer = np.full(length + 2 * margin, CANARY, "u1")
            start = margin - buffer.ctypes.data % 64
            inside = buffer[start : start + length]
            inside[...] = fill
            made.append(inside)
            return contextlib.nullcontext(inside.view(dtype).reshape(workers, size))

        monkeypatch.setattr(launch, "working_memory", memory)
        results = scaled_dot_product_attention(*arrays, return_aux=AUX_NAMES, **options)
        assert same_bits(results, expected)
        assert made
        for inside in made:
            assert_canaries(inside)


# Pages that must not be touched lie before and after each array, of which the first or the last byte is at their edge.
GUARDED = """
import ctypes, importlib, itertools, mmap, sys
import numpy as np
from numba_attn import scaled_dot_product_attention

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE, READ_WRITE, FORBIDDEN = mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, 0
maps = []

def guarded(x, at_end, gap):
    # Rows are `gap` elements apart, with none after the last.
    step = (x.shape[-1] + gap) * x.itemsize
    size = x[..., 0].size * step - gap * x.itemsize
    pages = -(-size // PAGE) * PAGE
    start = libc.mmap(None, pages + 2 * PAGE, READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0) + PAGE
    assert libc.mprotect(start - PAGE, PAGE, FORBIDDEN) == libc.mprotect(start + pages, PAGE, FORBIDDEN) == 0
    maps.append((start - PAGE, pages + 2 * PAGE))
    data = (ctypes.c_char * size).from_address(start + (pages - size if at_end else 0))
    strides = [step * int(np.prod(x.shape[i + 1 : -1])) for i in range(x.ndim - 1)]
    y = np.lib.stride_tricks.as_strided(np.frombuffer(data, np.uint8).view(x.dtype), x.shape, (*strides, x.itemsize))
    y[...] = x
    return y

rng, calls = np.random.default_rng(0), 0
shapes = list(itertools.product((1, 5, 17, 49, 70), (1, 7, 17, 100), (1, 3, 17, 33, 64), (1, 3, 17, 33)))
for name in sys.argv[1:]:
    if name == "bfloat16":
        importlib.import_module("ml_dtypes")
    dtype = np.dtype(name)
    for Lq, Lk, D, Dv in rng.permutation(shapes)[:40]:
        print(name, Lq, Lk, D, Dv, file=sys.stderr)
        q, k, v = (rng.standard_normal((2, *s)).astype(dtype) for s in ((Lq, D), (Lk, D), (Lk, Dv)))
        masks = [None, rng.random((Lq, Lk)) < 0.6, rng.random(Lk) < 0.6, rng.standard_normal((Lq, Lk)).astype(dtype)]
        masks += [rng.standard_normal(Lk), rng.standard_normal((Lq, Lk)).astype(np.float16)]
        some = {}, {"is_causal": True}, {"window": (5, 3), "query_offset": 3}, {"return_aux": ("lse", "key_weight")}
        for mask, options in itertools.product(masks, some):
            expected = np.empty((2, Lq, Dv), dtype)
            scaled_dot_product_attention(q, k, v, mask, out=expected, **options)
            for at_end, gap in ((True, 0), (True, 3), (False, 0)):
                arrays = [guarded(x, at_end, gap) for x in (q, k, v)]
                attn_mask = None if mask is None else guarded(mask, at_end, gap if mask.ndim > 1 else 0)
                out = guarded(expected * 0, at_end, gap)
                scaled_dot_product_attention(*arrays, attn_mask, out=out, **options)
                assert np.array_equal(out.astype(float), expected.astype(float), equal_nan=True)
                calls += 1
                del arrays, attn_mask, out
                while maps:
                    libc.munmap(*maps.pop())
print(calls)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="system calls of Linux")
def test_nothing_beside_an_array_is_read(python: Callable[..., str]) -> None:
    """Nor written: a load or store of a whole vector that reaches beyond an array would end the process."""
    assert int(python(GUARDED, *DTYPES)) > 8000
